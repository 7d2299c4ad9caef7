"""The objectives that a run can be compared with, by name, with the run's own settings."""

from dataclasses import replace
from typing import Any

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.objectives import presets

NAMES = {
    "grpo": "GRPO",
    "rlsd": "RLSD",
    "rlcsd": "RLCSD",
    "antisd": "AntiSD",
    "sdpo": "SDPO",
    "srpo": "SRPO",
    "sft": "SFT",
    "gate_off": "EGRSD without gate",
    "egrsd": "EGRSD",
    "cl_egrsd": "CL-EGRSD",
    "opsd": "OPSD",
    "crisp": "CRISP",
    "run": "this run",
}


def family(objective: ObjectiveConfig) -> dict[str, ObjectiveConfig]:
    """Return GRPO, EGRSD without gate, EGRSD and CL-EGRSD with the settings of `objective`.

    A key that `objective` has switched off takes its default, that of CL-EGRSD. The signal is the run's own.
    """
    default = ObjectiveConfig()
    switches: dict[str, Any] = {
        name: getattr(objective, name) or getattr(default, name) for name in ("mix", "attenuation", "lookahead")
    }
    full = replace(objective, preset="", function="", options={}, **switches)
    return {
        "grpo": replace(full, mix=0.0, attenuation=0.0, lookahead=0),
        "gate_off": replace(full, attenuation=0.0, lookahead=0),
        "egrsd": replace(full, lookahead=0),
        "cl_egrsd": full,
    }


def member(objective: ObjectiveConfig) -> str:
    """Return the name of `objective` in `family`, or "run" if it has none there."""
    objective = replace(objective, preset="")
    if not objective.attenuation:
        objective = replace(objective, lookahead=0)  # without a gate it makes no difference
    return next((name for name, other in family(objective).items() if other == objective), "run")


def title(objective: ObjectiveConfig) -> str:
    """Return the name of the objective: its preset's, a family member's, or that of a user's own class."""
    preset = presets().get(objective.preset, {})
    if objective.function and objective.function != preset.get("objective.function"):
        return objective.function.rpartition(":")[2]
    name = objective.preset or member(objective)
    return NAMES.get(name, name)


def settings(objective: ObjectiveConfig) -> str:
    """Return "ε 0.2, γ 0.3, W 3" (ratio_clip, attenuation, lookahead), or file and options of a user's own class."""
    o = objective
    if o.function:
        return ", ".join([o.function.rpartition(":")[0], *(f"{name} {value}" for name, value in o.options.items())])
    if not o.mix and not o.attenuation:
        return "w = 1, ω = 1"
    mix = "" if o.mix == 1 else f"λ {o.mix:g}, "
    return f"{mix}ε {o.ratio_clip:g}, γ {o.attenuation:g}, W {o.lookahead}"
