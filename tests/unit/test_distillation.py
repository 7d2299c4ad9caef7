"""Objectives with a divergence: the loss, the presets, the dump; tests/parallel has them on the engine."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives import DivergenceForm, loss
from megatron_egrsd.objectives.load import check_objective, load_objective, needs_teacher
from megatron_egrsd.report.family import title
from megatron_egrsd.report.scored_dump import load_scores, save_scores
from megatron_egrsd.report.token_page import page_data, render
from tests.presets import preset_objective
from tests.unit.test_extending import EXAMPLES, packed
from tests.unit.test_scores import batch

OPSD = preset_objective("opsd")
DISTIL_WRONG = ObjectiveConfig(function=f"{EXAMPLES / 'distil_wrong.py'}:DistilWrong", options={"strength": 0.5})


def test_the_loss_is_the_weighted_divergence_over_n():
    divergence = torch.tensor([0.5, 0.25, 2.0], requires_grad=True)
    weight, importance, n = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0, 0.5, 3.0]), torch.tensor([2.0, 4.0, 4.0])
    value = loss.divergence_loss(divergence, weight, importance, n)
    value.backward()
    assert value.item() == 0.5 / 2 - 0.25 / 4
    assert divergence.grad.tolist() == [1 / 2, -1 / 4, 0]


def test_opsd_trains_every_rollout_by_its_divergence_alone():
    check_objective(OPSD)
    objective, tokens = load_objective(OPSD), packed()
    assert objective.divergence == DivergenceForm("forward_kl", entry_clip=0.05) and needs_teacher(OPSD)
    assert objective.advantages(torch.zeros(3), torch.arange(3)).tolist() == [1, 1, 1]
    assert not objective.has_policy_loss and not objective.weight(tokens).any()
    assert objective.divergence_weight(tokens).tolist() == [1] * 7
    assert title(OPSD) == "OPSD" and title(dataclasses.replace(OPSD, function=DISTIL_WRONG.function)) == "DistilWrong"


def test_crisp_is_the_reverse_divergence_from_a_teacher_that_is_asked_to_be_concise():
    crisp = parse_config(["--model.path", "m", "--data.train", "t.jsonl", "--objective.preset", "crisp"])
    assert load_objective(crisp.objective).divergence == DivergenceForm("reverse_kl")
    assert (crisp.data.teacher_context, crisp.teacher.weights, crisp.teacher.snapshot_every) == (
        "concise",
        "snapshot",
        50,
    )
    assert title(crisp.objective) == "CRISP"


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"kind": "kl"}, "kind must be one of"), ({"entry_clip": 0}, "entry_clip must be above 0"),
     ({"kind": "jsd", "beta": 1}, "beta must be between 0 and 1"), ({"clip": 1}, "has no option 'clip'"),
     ({"top_k": 2.5}, "top_k must be a whole number, got 2.5")],
)  # fmt: skip
def test_bad_options_are_refused(options, reason):
    with pytest.raises(BadArgument, match=reason):
        check_objective(dataclasses.replace(OPSD, options=options))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("divergence = 'forward_kl'", "divergence should be a DivergenceForm, and is 'forward_kl'"),
        ("divergence, needs_teacher = DivergenceForm('jsd'), False", "needs_teacher is False"),
        ("divergence_weight = lambda self, tokens: tokens.advantage.mean()", r"divergence_weight should be .* \[5\]"),
    ],
)
def test_a_divergence_that_cannot_be_had_is_refused(line, reason, tmp_path):
    source = f"from megatron_egrsd.objectives import DivergenceForm, Objective\nclass Mine(Objective):\n    {line}\n"
    if "divergence_weight" in line:
        source += "    divergence = DivergenceForm('jsd')\n"
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(BadArgument, match=reason):
        check_objective(ObjectiveConfig(function=f"{tmp_path / 'mine.py'}:Mine"))


def test_an_objective_may_have_both_losses():
    objective, tokens = load_objective(DISTIL_WRONG), packed((1, 1, 1))  # A = -1.5, 0.7, 0
    assert objective.has_policy_loss
    assert objective.weight(tokens).tolist() == pytest.approx([0, 0.7, 0])
    assert objective.divergence_weight(tokens).tolist() == [0.5, 0, 0]


def test_a_dump_records_what_the_divergence_adds_and_the_page_shows_it(tmp_path):
    scored = batch(DISTIL_WRONG, divergence=True)
    save_scores(scored, tmp_path / "s.jsonl")
    loaded = load_scores(tmp_path / "s.jsonl")
    data = page_data(loaded, [0, 1])
    for r, before, row in zip(loaded, scored, data["rollouts"], strict=True):
        assert np.array_equal(r.divergence, before.divergence)
        assert (r.divergence > 0).all() == (r.advantage < 0) and (r.weight > 0).all() == (r.advantage > 0)
        assert row["objectives"]["run"]["weight"] == pytest.approx(r.weight + r.divergence, abs=1e-4)
    page = render(loaded, "mine")
    assert "DistilWrong (this run)" in page
    assert "signal of the run" in page and "advantage A" not in page.partition("<script")[0]


def test_a_dump_from_before_there_were_divergences_is_read(tmp_path):
    save_scores(batch(ObjectiveConfig()), tmp_path / "s.jsonl")
    text = (tmp_path / "s.jsonl").read_text()
    (tmp_path / "old.jsonl").write_text(text.replace(',"divergence":null', ""))
    assert "divergence" not in (tmp_path / "old.jsonl").read_text()
    assert all(r.divergence is None for r in load_scores(tmp_path / "old.jsonl"))
