"""AntiSD: its weights against the formulas in fp64, and the gate over steps."""

import dataclasses
import math

import pytest
import torch

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives import antisd
from megatron_egrsd.objectives.interface import Tokens, weigh
from megatron_egrsd.objectives.load import check_objective, load_objective, needs_teacher_prompts
from megatron_egrsd.objectives.loss import policy_loss
from megatron_egrsd.objectives.signal import History
from megatron_egrsd.report.family import title
from tests.mutants import mutant
from tests.presets import preset_objective

LENGTHS = [4, 3, 2]
ADVANTAGE = [0.9, -0.4, 0.0]  # of each rollout; the last one is trained as well
STUDENT = [-0.1, -3.0, -0.7, -1.2, -2.0, -0.4, -5.0, -0.3, -1.0]
TEACHER = [-0.2, -0.5, -9.0, -1.2, -25.0, -0.3, -0.1, -0.8, -1.1]  # far below, far above and equal to the student's
NEW = [-0.15, -2.6, -0.7, -1.3, -2.1, -0.1, -4.5, -0.3, -1.2]  # the policy in training; some ratios are clipped
CONFIG = preset_objective("antisd")
OPEN = History(5, notes={"warmed": 5.0, "warm": 0.8, "gate": 1.0})


def tokens(entropies=(1.0,) * 9) -> Tokens:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    advantage = torch.tensor(ADVANTAGE).repeat_interleave(torch.tensor(LENGTHS))
    return Tokens(cu_seqlens, advantage, torch.tensor(TEACHER), torch.tensor(entropies), torch.tensor(STUDENT))


def loss_and_gradient(module=antisd, history=OPEN) -> list[float]:
    weight, _ = weigh(module.AntiSD(CONFIG, history=history), tokens(), vocab_size=61)
    new = torch.tensor(NEW, requires_grad=True)
    loss = policy_loss(new, torch.tensor(STUDENT), weight, float(len(NEW)), CONFIG).loss
    loss.backward()
    return [loss.item(), *new.grad.tolist()]


def fp64(gate: float = 1.0) -> list[float]:
    """The same by the formulas, a token at a time."""
    advantages = [a for a, length in zip(ADVANTAGE, LENGTHS, strict=True) for _ in range(length)]
    loss, gradient = 0.0, []
    for a, student, teacher, new in zip(advantages, STUDENT, TEACHER, NEW, strict=True):
        phi = 0.5 * (math.log1p(math.exp(teacher - student)) - math.log(2))
        weight, ratio = a - 0.5 * gate * phi, math.exp(new - student)
        held = min(max(ratio, 0.8), 1.2)
        loss -= min(ratio * weight, held * weight) / len(NEW)
        gradient.append(-ratio * weight / len(NEW) if ratio * weight <= held * weight else 0.0)
    return [loss, *gradient]


def test_loss_and_gradient_are_those_of_the_formulas():
    assert loss_and_gradient() == pytest.approx(fp64(), rel=1e-5, abs=1e-7)
    warming = History(2, notes={"warmed": 2.0, "warm": 0.8})
    assert loss_and_gradient(history=warming) == pytest.approx(fp64(gate=0), rel=1e-5, abs=1e-7)


def test_a_token_gains_at_most_half_of_ln_2():
    x = torch.linspace(-200, 200, 401)
    batch = Tokens(torch.tensor([0, 401], dtype=torch.int32), torch.zeros(401), x, torch.ones(401), torch.zeros(401))
    weight, _ = weigh(antisd.AntiSD(CONFIG, strength=1.0, history=OPEN), batch, vocab_size=61)
    assert weight.max() == pytest.approx(math.log(2) / 2) and weight[200] == 0
    assert weight[-1] == pytest.approx((math.log(2) - 200) / 2) and bool((weight.diff() <= 0).all())


def follow(medians: list[float], module=antisd, **options) -> list[float]:
    """Return the gate of each step of a run whose batches have these median entropies."""
    history, gates = History(), []
    for median in medians:
        objective = module.AntiSD(CONFIG, **options, history=history)
        batch = tokens([median - 0.3] * 4 + [median] + [median + 2.0] * 4)
        _, fields = weigh(objective, batch, vocab_size=61)
        gates.append(fields["gate"].unique().item())
        prepared = dataclasses.replace(batch, teacher_entropy=None, fields=fields)  # no second median
        history = history.after([1.0, 0.0], objective.remember(prepared))
    return gates


WARM = [1.1, 0.9, 1.0, 1.2, 0.8]  # mean 1
LATER = {0.95: 1, 1.3: 1, 0.94: 1, 0.92: 0, 0.99: 0, 1.01: 1, 0.95 + 1e-3: 1, 0.1: 0, 0.94 + 1e-3: 0, 2.0: 1}


def test_the_gate_closes_below_the_threshold_and_opens_at_the_level_of_the_warm_up():
    assert follow([*WARM, *LATER]) == [0.0] * 5 + list(LATER.values())
    assert follow([0.1, 5.0], warmup=0) == [1, 1]
    assert follow([1.0, 0.99, 1.0, 0.5], warmup=1, collapse=1.0) == [0, 0, 1, 0]


def test_a_run_that_went_on_from_another_objective_calibrates_the_gate():
    objective = antisd.AntiSD(CONFIG, history=History(200))
    _, fields = weigh(objective, tokens(), vocab_size=61)
    assert fields["gate"].unique().item() == 0
    assert objective.remember(dataclasses.replace(tokens(), fields=fields)) == {"warmed": 1.0, "warm": 1.0}


MISTAKES = {
    "descent": ("tokens.advantage - self._ascent", "tokens.advantage + self._ascent"),
    "student over teacher": ("tokens.teacher_log_prob - tokens.student_log_prob",
                             "tokens.student_log_prob - tokens.teacher_log_prob"),
    "not zero for equal log-probs": (" - math.log(2)) / 2", ") / 2"),
    "twice as strong": (" - math.log(2)) / 2", " - math.log(2))"),
    "the gate left out": ('self.strength * tokens.fields["gate"] * phi', "self.strength * phi"),
    "lambda left out": ('self.strength * tokens.fields["gate"] * phi', 'tokens.fields["gate"] * phi'),
    "opens at once": ('notes.get("gate", 1.0)', "1.0"),
    "stays closed": ("if entropy >= warm:", "if entropy >= 2 * warm:"),
    "no share": ("entropy < self.collapse * warm", "entropy < warm"),
    "the mean for the median": ("entropy_quantile(tokens.teacher_entropy, 0.5, group=group)",
                                "tokens.teacher_entropy.mean()"),
    "the last step of the warm-up alone": ("warm + (entropy - warm) / (done + 1)", "entropy"),
    "acts in the warm-up": ("            return 0.0\n", "            return 1.0\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name):
    wrong = mutant(antisd, *MISTAKES[name])
    warming = History(2, notes={"warmed": 2.0, "warm": 0.8})
    right = (
        loss_and_gradient(wrong) == pytest.approx(fp64(), rel=1e-5, abs=1e-7)
        and loss_and_gradient(wrong, warming) == pytest.approx(fp64(gate=0), rel=1e-5, abs=1e-7)
        and follow([*WARM, *LATER], wrong) == [0.0] * 5 + list(LATER.values())
    )
    assert not right


def test_the_preset():
    config = parse_config(["--model.path", "m", "--data.train", "t.jsonl", "--objective.preset", "antisd"])
    check_objective(config.objective)
    o = config.objective
    assert (o.advantage, o.loss, o.clip_low, o.clip_high, o.importance_cap) == ("group", "ppo", 0.2, 0.2, None)
    assert config.teacher.weights == "live" and config.rollout.rollouts_per_prompt == 8
    assert needs_teacher_prompts(config) and title(o) == "AntiSD" and load_objective(o).trains_all
    for options in ({"collapse": 1.1}, {"collapse": 0.0}, {"warmup": -1}, {"strength": -1.0}):
        with pytest.raises(BadArgument, match=next(iter(options))):
            check_objective(dataclasses.replace(o, options=options))
