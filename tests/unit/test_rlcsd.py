"""RLCSD: its weights against fp64 and against its authors' loss, and the contexts that its teacher reads."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_egrsd.config import DataConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, load_rollouts, save_rollouts
from megatron_egrsd.data.siblings import SiblingContexts
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives import rlcsd
from megatron_egrsd.objectives.interface import Tokens, rollout_advantages, weigh
from megatron_egrsd.objectives.load import check_objective, load_objective, needs_teacher_prompts
from megatron_egrsd.objectives.loss import policy_loss
from megatron_egrsd.report.family import title
from megatron_egrsd.run.offline_rollouts import load_replay
from tests.mutants import mutant
from tests.presets import preset_objective

LENGTHS = [5, 3, 4]
BASE = ["--model.path", "m", "--data.train", "t.jsonl"]


def _wave(scale: float, phase: float) -> torch.Tensor:
    """Log-probs [12] that look random and are the same everywhere."""
    return -scale * torch.sin(torch.arange(1, 13, dtype=torch.float64) * 1.7 + phase).abs()


def _inputs() -> dict:
    i, old = torch.arange(12, dtype=torch.float64), _wave(1.0, 1.1)
    # Wrong rollouts disagree by some tenths of a nat, so that a mean of log-probs is not the log of a mean.
    wrong = torch.stack([_wave(1.1, 0.3) - 0.3 + 0.3 * torch.sin(i * 1.3 + row) for row in (0, 2, 4)])
    wrong[1:, :5] = torch.nan  # one wrong rollout for the first, two for the second, three for the third
    wrong[2:, 5:8] = torch.nan
    mean = wrong.exp().nanmean(0).log()
    return {
        "lengths": LENGTHS,
        "eta": 0.7,
        "advantage": torch.tensor([0.9] * 5 + [-0.3] * 3 + [0.2] * 4, dtype=torch.float64),
        "right": mean + 0.02 * torch.sin(i * 2 + 3) ** 3,  # where tanh bends, below and above the threshold
        "wrong": wrong,
        "old": old,
        "new": old + 0.3 * torch.sin(i * 2.3),
        "rollout": old + 0.1 * torch.cos(i),
    }


INPUTS = _inputs()
CONFIG = dataclasses.replace(preset_objective("rlcsd"), options={"selected_weight": INPUTS["eta"]})
# Of INPUTS by the authors' own loss (THU-BPM/RLCSD, commit 7eeff3c, compute_policy_loss_rlcsd in fp64; tau 0.02,
# beta 1, lam 0.5, delta 0.02, clip 0.2, importance weight at most 2): loss, and gradient by `new`.
AUTHORS_LOSS = -0.6270154632120537
AUTHORS_GRADIENT = [-0.2714512254, 0, -0.0624746466, -0.0954988724, -0.0460919581, 0, 0.0155551344, 0.0421511304,
                    -0.0593757204, 0, 0, -0.0700498064]  # fmt: skip


def loss_and_gradient(module=rlcsd) -> list[float]:
    """Loss and gradient by `new` of INPUTS, and of a rollout of advantage 0 behind them, which N alone counts."""
    lengths = torch.tensor([0, *LENGTHS, 2])
    x = {name: torch.nn.functional.pad(INPUTS[name], (0, 2), value=-0.4).float() for name in ("right", "wrong", "old")}
    tokens = Tokens(lengths.cumsum(0, dtype=torch.int32), torch.nn.functional.pad(INPUTS["advantage"], (0, 2)).float(),
                    teacher_log_prob=x["right"], context_log_prob=x["wrong"])  # fmt: skip
    weight, _ = weigh(module.RLCSD(CONFIG, **CONFIG.options), tokens, vocab_size=61)
    new, rollout = (torch.nn.functional.pad(INPUTS[n], (0, 2), value=-0.4).float() for n in ("new", "rollout"))
    new.requires_grad_()
    loss = policy_loss(new, x["old"], weight, float(len(weight)), CONFIG, rollout_log_prob=rollout).loss
    loss.backward()
    return [loss.item(), *new.grad.tolist()]


def fp64() -> list[float]:
    """The same by the formulas, a token at a time."""
    i, old, new = 0, INPUTS["old"].tolist(), INPUTS["new"].tolist()
    terms: dict[bool, list[tuple[int, float, float]]] = {False: [], True: []}
    for length in LENGTHS:
        for _ in range(length):
            wrong = [math.exp(x) for x in INPUTS["wrong"][:, i].tolist() if not math.isnan(x)]
            contrast = INPUTS["right"][i].item() - math.log(sum(wrong) / len(wrong))
            step, a = 0.5 * math.tanh(contrast / 0.02), INPUTS["advantage"][i].item()
            selected = abs(step) > 0.02
            moved = a + step if selected else a
            weight = max(moved, 0) if a > 0 else min(moved, 0)
            c = min(math.exp(old[i] - INPUTS["rollout"][i].item()), 2)
            ratio = math.exp(new[i] - old[i])
            held = min(max(ratio, 0.8), 1.2)
            free = ratio * weight <= held * weight
            terms[selected].append((i, -c * min(ratio * weight, held * weight), -c * ratio * weight * free))
            i += 1
    share = {False: 1 / len(terms[False]), True: INPUTS["eta"] / len(terms[True])}
    gradient = {i: share[s] * g for s, part in terms.items() for i, _, g in part}
    loss = sum(share[s] * value for s, part in terms.items() for _, value, _ in part)
    return [loss, *(gradient[i] for i in range(sum(LENGTHS))), 0.0, 0.0]


def test_loss_and_gradient_are_the_authors_and_the_formulas():
    found = loss_and_gradient()
    assert found == pytest.approx([AUTHORS_LOSS, *AUTHORS_GRADIENT, 0, 0], rel=2e-5, abs=1e-6)
    assert found == pytest.approx(fp64(), rel=2e-5, abs=1e-6)


MISTAKES = {
    "mean of the log-probs": ("wrong.nan_to_num(nan=-torch.inf).logsumexp(0) - there.sum(0).clamp(min=1).log()",
                              "wrong.nanmean(0)"),
    "sum for the mean over wrong rollouts": (" - there.sum(0).clamp(min=1).log()", ""),
    "missing contexts count as sure": ("nan=-torch.inf", "nan=0.0"),
    "wrong over right": ("tokens.teacher_log_prob - mixture", "mixture - tokens.teacher_log_prob"),
    "no squash": ("torch.tanh(contrast / self.tau)", "(contrast / self.tau)"),
    "no threshold": ("step.abs() > self.threshold", "step.abs() > -1"),
    "unselected tokens move": ("torch.where(selected, step, 0.0)", "step"),
    "one mean over all tokens": ("every / unchanged.clamp(min=1)", "torch.ones_like(every)"),
    "the weight of the selected left out": ("self.selected_weight * every", "every"),
    "untrained rollouts are in the means": ("trained = tokens.advantage != 0", "trained = tokens.advantage < 9"),
    "the sign may turn": ("torch.where(advantage > 0, moved.clamp(min=0), moved.clamp(max=0))", "moved"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name):
    assert loss_and_gradient(mutant(rlcsd, *MISTAKES[name])) != pytest.approx(fp64(), rel=2e-5, abs=1e-6)


def test_the_preset_is_its_authors_and_needs_no_solutions():
    base = [*BASE, "--objective.preset", "rlcsd"]
    config = parse_config(base)
    check_objective(config.objective)
    o, t = config.objective, config.teacher
    assert (o.advantage, o.loss, o.clip_low, o.clip_high, o.importance_cap) == ("group", "ppo", 0.2, 0.2, 2.0)
    assert (t.weights, t.snapshot_every, config.data.wrong_siblings, config.rollout.rollouts_per_prompt) == (
        "snapshot", 10, 4, 8)  # fmt: skip
    assert not needs_teacher_prompts(config) and title(o) == "RLCSD"
    with pytest.raises(BadArgument, match="rollouts_per_prompt must be at least 3, and is 2"):
        parse_config([*base, "--rollout.rollouts_per_prompt", "2"])
    with pytest.raises(BadArgument, match=r"must contain \{solution\}"):
        parse_config([*base, "--data.teacher_template", "{problem} {answer}"])
    with pytest.raises(BadArgument, match="tau is 0; it must be positive"):
        check_objective(dataclasses.replace(o, options={"tau": 0}))


# -- what the teacher reads ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build():
    from transformers import AutoTokenizer

    from megatron_egrsd.data.prompt_builder import PromptBuilder
    from tests.parallel.test_algorithm1 import TOKENIZER

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)

    def make(context: str, template: str = "{problem}\nref:{solution}", **changes) -> SiblingContexts:
        data = DataConfig(teacher_template=template, teacher_context=context, **changes)
        return SiblingContexts(PromptBuilder(tokenizer, data, 100, 512))

    return make


def group(*responses: tuple[str, float], finish="stop", number=0) -> list[Rollout]:
    prompt = Prompt(Problem("p", "2+3=?", "5", ""), [1, 2], [])
    return [Rollout(prompt, number, [7, 8], [-1.0, -1.0], finish, 0, text, reward) for text, reward in responses]


def read(contexts: SiblingContexts, rollouts: list[Rollout]) -> list[list[str]]:
    decode = contexts.builder.tokenizer.decode
    return [[decode(ids).partition("ref:")[2].partition("<")[0] for ids in r.contexts] for r in contexts(rollouts)]


def test_a_rollout_reads_the_next_right_one_and_the_wrong_ones_behind_it(build):
    """It never reads itself; groups are not mixed, whatever their order; without both kinds it reads none."""
    first = group(("2+3=5", 1.0), ("2+3=6", 0.0), ("3+2=5", 1.0), ("2+3=7", 0.0), ("2+3=8", 0.0))
    second = group(("5", 1.0), ("6", 0.0), number=1)
    mixed = [first[0], second[0], *first[1:], second[1]]
    assert read(build("contrast", wrong_siblings=2), mixed) == [
        ["3+2=5", "2+3=6", "2+3=7"], [], ["3+2=5", "2+3=7", "2+3=8"], ["2+3=5", "2+3=7", "2+3=8"],
        ["2+3=5", "2+3=8", "2+3=6"], ["2+3=5", "2+3=6", "2+3=7"], []]  # fmt: skip
    assert read(build("sibling"), mixed) == [["3+2=5"], [], ["3+2=5"], ["2+3=5"], ["2+3=5"], ["2+3=5"], ["5"]]
    assert read(build("contrast"), group(("5", 1.0), ("5", 1.0), ("5", 1.0))) == [[], [], []]


def test_siblings_that_cannot_be_quoted_are_left_out(build):
    cut = group(("2+3=5", 1.0), ("3+2=5", 1.0), finish="length")
    long, special = group(("2+3=5" * 30, 1.0)), group(("2+3=5<|im_end|>", 1.0))
    last = group(("5", 0.0))
    assert read(build("sibling", max_prompt_tokens=60), [*cut, *long, *special, *last]) == [[]] * 5
    boxed = group((r"\boxed{6}", 0.0), ("6", 0.0), ("5", 1.0), ("7", 0.0))
    contexts = build("contrast", "{problem}\nref:{solution} is {answer}")(boxed)
    assert [len(r.contexts) for r in contexts] == [0, 2, 0, 2]  # 6 and 7 name no answer; one wrong one is left


def test_a_replay_takes_contexts_only_if_its_teacher_reads_them(build, tmp_path):
    rollouts = {name: build(name)(group(("5", 1.0), ("6", 0.0), ("7", 0.0))) for name in ("contrast", "sibling")}
    for name, some in rollouts.items():
        save_rollouts(some, tmp_path / name)
    sizes = ["--rollout.prompts_per_step", "1", "--rollout.rollouts_per_prompt", "3"]

    def replay(name: str, preset: str) -> list[Rollout]:
        config = parse_config([*BASE, "--objective.preset", preset, *sizes])
        return load_replay(tmp_path / name, config, SimpleNamespace(vocab_size=10_000))

    assert replay("contrast", "rlcsd") == rollouts["contrast"]
    assert [r.contexts for r in replay("contrast", "grpo")] == [None] * 3  # so that all of them have a signal
    with pytest.raises(BadArgument, match=r"line 2: no contexts as data\.teacher_context makes them"):
        replay("sibling", "rlcsd")
    with pytest.raises(BadArgument, match="line 1: no teacher prompt"):
        replay("contrast", "rlsd")


def test_a_batch_without_any_contexts_has_weights(build):
    """All groups all right, or all wrong."""
    nothing, x = torch.zeros(5), torch.tensor([-0.1, -2.0, -0.7, -1.0, -0.2])
    tokens = Tokens(torch.tensor([0, 3, 5], dtype=torch.int32), nothing, x, x, context_log_prob=torch.zeros(0, 5))
    weight, fields = weigh(load_objective(CONFIG), tokens, vocab_size=61)
    assert weight.equal(nothing) and fields["contrast"].equal(nothing)


def test_a_rollout_without_contexts_has_no_signal_and_files_keep_them(build, tmp_path):
    rollouts = build("contrast")(group(("5", 1.0), ("6", 0.0), ("6", 0.0)))
    assert [bool(r.contexts) for r in rollouts] == [False, True, True]
    assert [bool(a) for a in rollout_advantages(rollouts, load_objective(CONFIG), 100)[1]] == [False, True, True]
    save_rollouts(rollouts, tmp_path / "r.jsonl")
    assert load_rollouts(tmp_path / "r.jsonl") == rollouts
    row = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[1])
    for bad in ([[]], "no", [[-1]], [["a"]]):
        (tmp_path / "bad.jsonl").write_text(json.dumps(row | {"contexts": bad}) + "\n")
        with pytest.raises(BadArgument, match="line 1: not a rollout"):
            load_rollouts(tmp_path / "bad.jsonl")
