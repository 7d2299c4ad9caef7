"""The objectives by name: `--objective.preset NAME`. Any key that is given beside it overrides it.

A preset is a whole objective: the defaults of `ObjectiveConfig`, which are the paper's CL-EGRSD, and over them its row.
"""

# The paper's own comparison (arXiv 2605.13255, section 5): one direction, one loss; magnitude and gate differ.
_PAPER: dict[str, object] = {
    "objective.lookahead": 0,
    "teacher.weights": "frozen",
    "data.teacher_context": "template",
    "rollout.rollouts_per_prompt": 1,
}
_GROUPS = {"objective.advantage": "group", "objective.length_bonus": 0.0, "rollout.rollouts_per_prompt": 8}
# SGLang reports the probabilities before a restriction of sampling, which the importance weight would miss.
_CAPPED = {"objective.importance_cap": 2.0, "rollout.top_p": 1.0, "rollout.top_k": 0}
_UNGATED = {"objective.attenuation": 0.0}
# No reward, no weights of sampled tokens: a divergence from the teacher at every token of every rollout.
_DISTILLATION = {
    "objective.function": "megatron_egrsd.objectives.distillation:Distillation",
    "objective.length_bonus": 0.0,
    "objective.loss_normalization": "seq_mean",
}
# A moving average of the student reads a right rollout of the same prompt.
_SIBLING = (
    _GROUPS
    | _UNGATED
    | _CAPPED
    | {
        "objective.mix": 0.0,
        "teacher.weights": "ema",
        "teacher.ema_decay": 0.95,
        "data.teacher_context": "sibling",
    }
)

_PRESETS = {
    "egrsd": _PAPER,
    "cl_egrsd": _PAPER | {"objective.lookahead": 3},
    "gate_off": _PAPER | _UNGATED,  # the paper's stand-in for RLSD
    # arXiv 2402.03300; the token weight is the advantage.
    "grpo": _PAPER | _GROUPS | _UNGATED | {"objective.mix": 0.0, "objective.loss": "ppo"},
    # arXiv 2601.18734, with the clipped entries of its authors' code.
    "opsd": _PAPER | _DISTILLATION | {"objective.options": {"kind": "forward_kl", "entry_clip": 0.05}},
    # arXiv 2603.05433, with its copies of the teacher (section 3.3).
    "crisp": _PAPER
    | _DISTILLATION
    | {
        "objective.options": {"kind": "reverse_kl"},
        "teacher.weights": "snapshot",
        "teacher.snapshot_every": 50,
        "data.teacher_context": "concise",
    },
    # The baseline of the paper; cross-entropy is at temperature 1, whatever samples.
    "sft": _PAPER
    | {
        "objective.function": "megatron_egrsd.objectives.sft:SFT",
        "objective.length_bonus": 0.0,
        "objective.score_temperature": 1.0,
    },
    # arXiv 2606.11709, with the settings of its authors' code.
    "rlcsd": _PAPER
    | _GROUPS
    | _UNGATED
    | _CAPPED
    | {
        "objective.function": "megatron_egrsd.objectives.rlcsd:RLCSD",
        "objective.mix": 0.0,
        "objective.loss": "ppo",
        "objective.clip_high": 0.2,
        "teacher.weights": "snapshot",
        "teacher.snapshot_every": 10,
        "data.teacher_context": "contrast",
    },
    # arXiv 2601.20802, with the settings of its authors' code.
    "sdpo": _PAPER | _SIBLING | {"objective.function": "megatron_egrsd.objectives.sdpo:SDPO"},
    # arXiv 2604.02288, table 3.
    "srpo": _PAPER | _SIBLING | {"objective.function": "megatron_egrsd.objectives.sdpo:SRPO", "objective.loss": "ppo"},
    # arXiv 2605.11609, table 5: the teacher is the student itself.
    "antisd": _PAPER
    | _GROUPS
    | _UNGATED
    | {
        "objective.function": "megatron_egrsd.objectives.antisd:AntiSD",
        "objective.mix": 0.0,
        "objective.loss": "ppo",
        "objective.clip_high": 0.2,
        "teacher.weights": "live",
    },
    # arXiv 2604.03128; decay and copies of the teacher as in its authors' later code (arXiv 2606.11709).
    "rlsd": _PAPER
    | _GROUPS
    | _UNGATED
    | _CAPPED
    | {
        "objective.mix": 0.5,
        "objective.mix_decay_steps": 50,
        "objective.loss": "ppo",
        "teacher.weights": "snapshot",
        "teacher.snapshot_every": 10,
    },
}


def presets() -> dict[str, dict[str, object]]:
    """Return the keys in which each preset differs from the defaults of `objective`, and its keys of other sections."""
    return {name: dict(keys) for name, keys in _PRESETS.items()}
