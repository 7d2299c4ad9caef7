"""SDPO and SRPO: loss and gradient against SDPO's authors' and fp64, planted mistakes, presets."""

import dataclasses
import math

import pytest
import torch

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.samples import Problem, Prompt, Rollout
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives import rlcsd, sdpo
from megatron_egrsd.objectives.interface import Tokens, rollout_advantages
from megatron_egrsd.objectives.load import check_objective, load_objective, needs_teacher_prompts
from megatron_egrsd.objectives.loss import divergence_loss, importance_weight, policy_loss
from megatron_egrsd.report.family import title
from megatron_egrsd.vocab_parallel import divergence
from tests.mutants import mutant
from tests.presets import preset_objective

LENGTHS, TOP_K, VOCAB = [5, 3, 4], 3, 11
CONFIG = {name: dataclasses.replace(preset_objective(name), options={"top_k": TOP_K}) for name in ("sdpo", "srpo")}
ADVANTAGE = {"sdpo": [1.0, 0.0, 1.0], "srpo": [-0.4, 0.0, 1.3]}  # the second rollout's teacher has nothing to read


def inputs() -> dict:
    """Logits [12, 11] of two models that look random and are the same everywhere, and what was sampled."""
    i, v = torch.arange(12, dtype=torch.float64)[:, None], torch.arange(VOCAB, dtype=torch.float64)
    student = 2 * torch.sin(1.7 * i + 2.9 * v + 0.3 * v * v)
    teacher = student + 1.5 * torch.sin(0.9 * i * v + 1.1)
    sampled = (torch.arange(12) * 7 + 3) % VOCAB
    own = student.log_softmax(-1)[range(12), sampled]
    return {
        "student": student,
        "teacher": teacher,
        "sampled": sampled,
        "rollout": own + 0.9 * torch.cos(2.3 * i[:, 0]),  # SGLang's log-probs; some importance weights are above 2
        "informed": [True, False, True],
        "direction": torch.sin(v + 0.5),  # of the logits: one number for each token's gradient
    }


INPUTS = inputs()
# Of INPUTS by the authors' own function (lasgroup/SDPO, commit 0e6d510, compute_self_distillation_loss in fp64 with the
# settings of its configuration, but the top 3; on-policy, importance weights at most 2): the loss, and the gradient of
# each token's logits along `direction`.
AUTHORS_LOSS = 0.04645751885596666
AUTHORS_GRADIENT = [0, -0.0041369319, 0.0056321767, 0.002315486, -0.0076527831, 0, 0, 0, -0.0008971232, 0.0008143409,
                    -0.0023466651, -0.0036555347]  # fmt: skip


def loss_and_gradient(name: str, module=sdpo) -> list[float]:
    """Loss, and gradient along the direction, of INPUTS as `learn` puts them together."""
    config, student = CONFIG[name], INPUTS["student"].float().requires_grad_()
    objective = getattr(module, name.upper())(config, **config.options)
    teacher, places = INPUTS["teacher"].float(), (range(12), INPUTS["sampled"])
    value, entropy = divergence(teacher, student, **vars(objective.divergence))
    log_prob = student.log_softmax(-1)[places]
    advantage = torch.tensor(ADVANTAGE[name]).repeat_interleave(torch.tensor(LENGTHS))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    tokens = Tokens(cu_seqlens, advantage, teacher.log_softmax(-1)[places], entropy, log_prob.detach())
    tokens = dataclasses.replace(tokens, fields=objective.prepare(tokens, vocab_size=VOCAB))
    rollout = INPUTS["rollout"].float()
    loss = policy_loss(log_prob, log_prob, objective.weight(tokens), 12.0, config, rollout_log_prob=rollout).loss
    importance = importance_weight(log_prob, rollout, config)
    loss = loss + divergence_loss(value, objective.divergence_weight(tokens), importance, 12.0)
    loss.backward()
    return [loss.item(), *(student.grad @ INPUTS["direction"].float()).tolist()]


def fp64(name: str) -> list[float]:
    """The same by the formulas, a token at a time."""
    student, teacher = INPUTS["student"].clone().requires_grad_(), INPUTS["teacher"]
    advantages = [a for a, length in zip(ADVANTAGE[name], LENGTHS, strict=True) for _ in range(length)]
    pulled = [i for i, a in enumerate(advantages) if (a < 0 if name == "srpo" else a)]
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    weight = {i: math.exp(-entropy[i].item()) if name == "srpo" else 1.0 for i in pulled}
    mean = sum(weight.values()) / len(weight)
    loss = torch.zeros((), dtype=torch.float64)
    for i, advantage in enumerate(advantages):
        log_q, log_p = student[i].log_softmax(-1), teacher[i].log_softmax(-1)
        log_prob = log_q[INPUTS["sampled"][i]]
        correction = min(math.exp(log_prob.item() - INPUTS["rollout"][i].item()), 2.0)
        if i in weight:
            best = sorted(range(VOCAB), key=lambda v, q=log_q: -q[v].item())[:TOP_K]
            q, p = log_q[best].exp(), log_p[best].exp()
            q, p = torch.cat([q, 1 - q.sum()[None]]), torch.cat([p, 1 - p.sum()[None]])
            m = (p + q) / 2
            pull = 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum()
            loss = loss + correction * weight[i] / mean * pull / (12 if name == "srpo" else len(pulled))
        elif name == "srpo" and advantage > 0:
            loss = loss - correction * advantage * (log_prob - log_prob.detach()).exp() / 12
    loss.backward()
    return [loss.item(), *(student.grad @ INPUTS["direction"]).tolist()]


def test_loss_and_gradient_of_sdpo_are_its_authors():
    assert loss_and_gradient("sdpo") == pytest.approx([AUTHORS_LOSS, *AUTHORS_GRADIENT], rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("name", CONFIG)
def test_loss_and_gradient_are_those_of_the_formulas(name):
    assert loss_and_gradient(name) == pytest.approx(fp64(name), rel=2e-5, abs=1e-7)


MISTAKES = {
    "untrained rollouts are in the mean": ("sdpo", "(every / count.clamp(min=1)).float()", "1.0"),
    "untrained rollouts are pulled": ("sdpo", '{"scale": trained * (every', '{"scale": (every'),
    "right rollouts are pulled": ("srpo", "wrong = tokens.advantage < 0", "wrong = tokens.advantage != 0"),
    "wrong ones are pushed as well": ("srpo", "return tokens.advantage.clamp(min=0)", "return tokens.advantage"),
    "unsure tokens weigh more": ("srpo", "torch.exp(-self.focus", "torch.exp(self.focus"),
    "entropy left out": ("srpo", "torch.exp(-self.focus * tokens.teacher_entropy)", "1.0"),
    "weights without their mean": ("srpo", "(count / total.clamp(min=torch.finfo(torch.float32).tiny)).float()", "1.0"),
    "their sum for their mean": ("srpo", "(count / total", "(1 / total"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake):
    name, old, new = MISTAKES[mistake]
    assert loss_and_gradient(name, mutant(sdpo, old, new)) != pytest.approx(fp64(name), rel=2e-5, abs=1e-7)


def test_a_right_rollout_alone_is_reinforced_by_srpo_and_left_out_by_sdpo():
    prompt = Prompt(Problem("p", "2+3=?", "5", ""), [1, 2], [])
    rollouts = [
        Rollout(prompt, 0, [7, 8], [-1.0, -1.0], "stop", 0, "", reward, contexts=contexts)
        for reward, contexts in ((1.0, []), (0.0, [[3]]), (0.0, [[3]]), (0.0, []))
    ]
    signal = {name: rollout_advantages(rollouts, load_objective(CONFIG[name]), 100)[1] for name in CONFIG}
    assert signal["sdpo"] == [0, 1, 1, 0]
    right, *wrong, unread = signal["srpo"]
    assert [right, *wrong, unread] == pytest.approx([1.5, -0.5, -0.5, 0.0], abs=1e-5)


def test_a_batch_without_any_right_rollout_has_weights():
    nothing = torch.zeros(5)
    tokens = Tokens(torch.tensor([0, 3, 5], dtype=torch.int32), nothing, nothing - 1, nothing + 1, nothing - 1)
    for name, config in CONFIG.items():
        objective = load_objective(config)
        assert objective.prepare(tokens, vocab_size=61)["scale"].equal(nothing), name


@pytest.mark.parametrize("name", CONFIG)
def test_the_presets(name):
    config = parse_config(["--model.path", "m", "--data.train", "t.jsonl", "--objective.preset", name])
    check_objective(config.objective)
    form = load_objective(config.objective).divergence
    assert (form.kind, form.beta, form.top_k, form.top_k_of) == ("jsd", 0.5, 100, "student")
    assert (config.teacher.weights, config.teacher.ema_decay, config.objective.importance_cap) == ("ema", 0.95, 2.0)
    assert not needs_teacher_prompts(config) and title(config.objective) == name.upper()
    with pytest.raises(BadArgument, match="top_k must be at least 1"):
        check_objective(dataclasses.replace(config.objective, options={"top_k": 0}))


def test_means_over_chosen_tokens_refuse_another_normalization():
    for cls, preset in ((sdpo.SDPO, "sdpo"), (rlcsd.RLCSD, "rlcsd")):
        config = dataclasses.replace(preset_objective(preset), loss_normalization="seq_mean")
        with pytest.raises(
            BadArgument, match=f"the loss of {cls.__name__} is a mean over tokens .* set it to token_mean"
        ):
            check_objective(config)
    check_objective(dataclasses.replace(preset_objective("srpo"), loss_normalization="seq_mean"))
