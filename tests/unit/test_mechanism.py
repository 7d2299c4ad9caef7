"""The paper's Figure 4 on scored dumps: deciles, regimes and what the lookahead restores, against plain Python."""

import dataclasses

import numpy as np
import pytest

from benchmarks.mechanism.columns import columns
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.signal import History
from megatron_egrsd.report.command import main
from megatron_egrsd.report.mechanism import REGIMES, measure, regimes
from megatron_egrsd.report.scored_dump import save_scores
from tests.presets import preset_objective
from tests.unit.test_scores import batch

CL_EGRSD = preset_objective("cl_egrsd", attenuation=0.8)


def test_regimes_are_those_of_their_definition():
    h = np.array([0.0, 0.2, 0.5, 0.9, 0.9, 0.9])
    ahead = np.array([0.0, 0.1, 0.4, 0.9, 0.1, 0.5])
    assert [REGIMES[i] for i in regimes(h, ahead, 0.2, 0.8)] == ["lock", "lock", "mid", "fork", "pivot", "mid"]


def test_deciles_and_restored_weight_against_plain_python():
    scored = batch(CL_EGRSD)
    found = measure([scored])
    tokens = []
    largest = max(1.0, max(float(r.teacher_entropy.max()) for r in scored))
    for r in scored:
        for t, h in enumerate(r.teacher_entropy.tolist()):
            ahead = min(r.teacher_entropy[t : t + 4].tolist())
            delta = float(r.teacher_log_prob[t] - r.student_log_prob[t])
            ratio = min(max(np.exp(np.sign(r.advantage) * delta), 0.8), 1.2)
            gate, looking = (max(0.1, 1 - 0.8 * x / largest) for x in (h, ahead))
            tokens.append((h, abs(delta), ratio * gate, h / largest, ahead / largest, looking - gate))
    tokens.sort()
    by_decile = np.array_split(np.array(tokens), 10)
    assert found.tokens == len(tokens)
    np.testing.assert_allclose(found.gap, [d[:, 1].mean() for d in by_decile], rtol=1e-5)
    np.testing.assert_allclose(found.weight, [d[:, 2].mean() for d in by_decile], rtol=1e-5)
    columns = np.array(tokens)
    low, high = np.quantile(columns[:, 3], [0.5, 0.7])
    kinds = regimes(columns[:, 3], columns[:, 4], low, high)
    for i, name in enumerate(REGIMES):
        assert found.share[name] == pytest.approx((kinds == i).mean())
        if (kinds == i).any():
            assert found.restored[name] == pytest.approx(columns[kinds == i, 5].mean(), rel=1e-4, abs=1e-6)
    assert sum(found.share.values()) == pytest.approx(1) and min(found.restored["pivot"], found.restored["fork"]) >= 0


def test_the_weights_are_the_familys_whatever_trained():
    """OPSD records an advantage of 1 for every rollout, EGRSD one of the sign of the answer; and a mix may decay."""
    scored = [dataclasses.replace(r, advantage=1.0 if r.right else -1.0) for r in batch(CL_EGRSD)]
    opsd = dataclasses.replace(CL_EGRSD, function="megatron_egrsd.objectives.distillation:Distillation")
    others = [dataclasses.replace(r, objective=opsd, advantage=1.0) for r in scored]
    assert {r.right for r in scored} == {True, False}
    np.testing.assert_allclose(measure([others]).weight, measure([scored]).weight, rtol=1e-6)
    weights = [columns([x]).direction for x in (others, scored)]
    np.testing.assert_array_equal(*weights)
    decaying = dataclasses.replace(CL_EGRSD, mix_decay_steps=10)
    begun, ended = ([dataclasses.replace(r, objective=decaying, history=History(steps=n)) for r in scored]
                    for n in (0, 10))  # fmt: skip
    np.testing.assert_allclose(measure([begun]).weight, measure([scored]).weight, rtol=1e-6)
    unmixed = dataclasses.replace(CL_EGRSD, mix=1e-9)
    alike = [dataclasses.replace(r, objective=unmixed) for r in scored]
    np.testing.assert_allclose(measure([ended]).weight, measure([alike]).weight, rtol=1e-6)


def test_a_flat_gate_restores_nothing_and_grpo_has_none(tmp_path, capsys):
    surer = dataclasses.replace(CL_EGRSD, gate_floor=1.0)
    assert max(measure([batch(surer)]).restored.values()) == 0
    with pytest.raises(BadArgument, match="no teacher"):
        measure([batch(preset_objective("grpo"), teacher=False)])


def test_the_command_prints_the_table_and_draws_the_picture(tmp_path, capsys):
    save_scores(batch(CL_EGRSD), tmp_path / "scores" / "step_000004.jsonl")
    main(["--mechanism", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(word in printed for word in (*REGIMES, "|delta|", "29 response tokens", "mechanism.png"))
    assert (tmp_path / "mechanism.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadArgument, match="holds no scored rollouts"):
        main(["--mechanism", str(tmp_path / "none")])
