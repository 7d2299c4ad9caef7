"""One step off: the next batch is sampled while this one trains. Real servers, real ranks, real faults."""

import math
import shutil

import numpy as np
import pytest

from megatron_egrsd.data.samples import load_rollouts
from megatron_egrsd.report.scored_dump import load_scores
from tests.end_to_end.test_train import descendants_with, metrics, run
from tests.faults.runs import PER_PROMPT, PROMPTS, replayed, rows, steps, survive

CAP = 1.02  # low, so that it cuts what one update does
STALE = {"rollout.staleness": 1, "objective.importance_cap": CAP}


def versions(output, step: int) -> set[int]:
    return {r.weight_version for r in load_rollouts(output / "rollouts" / f"step_{step:06d}.jsonl")}


def assert_importance(output, made: list[dict]) -> None:
    """loss/importance is the mean of c = min(pi_old / pi_rollout, CAP) over the trained tokens, in fp64; CAP cuts."""
    cut = 0
    for m in made:
        scored = load_scores(output / "scores" / f"step_{m['step']:06d}.jsonl")
        pairs = [(r.student_log_prob, r.rollout_log_prob) for r in scored if r.advantage]
        old, sampled = np.concatenate(pairs, 1).astype(np.float64)
        ratio = np.exp(old - sampled)
        assert m["loss/importance"] == pytest.approx(np.minimum(ratio, CAP).mean(), rel=1e-6)
        cut += int((ratio > CAP).sum())
    assert cut > 20


@pytest.mark.timeout(500)
def test_every_batch_but_the_first_is_one_update_behind_and_weighted_for_it(tmp_path):
    output = tmp_path / "run"
    done = run(output, steps=4, **STALE)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    made = [m for m in metrics(output) if "optimizer/updates" in m]
    assert [m["step"] for m in made] == [1, 2, 3, 4]
    assert [m["rollout/staleness"] for m in made] == [0, 1, 1, 1]
    assert [versions(output, step) for step in (1, 2, 3, 4)] == [{0}, {0}, {1}, {2}]
    assert all(m["optimizer/updates"] == 1 and m["time/wait"] <= m["time/step"] for m in made)
    assert made[0]["sync/log_prob_difference"] < 1e-5 < 1e-3 < made[1]["sync/log_prob_difference"]
    assert [m["step"] for m in metrics(output) if "evaluation/accuracy" in m] == [0, 4]

    assert_importance(output, made)

    # Batch 3 was sampled while batch 2 trained, by the weights after the first update and no others: trained on
    # batch 1 alone, the engine has the log-probs that SGLang reported.
    (tmp_path / "replay").mkdir()
    for step, source in ((1, 1), (2, 3)):
        name = "rollouts/step_{:06d}.jsonl"
        shutil.copy(output / name.format(source), tmp_path / "replay" / name.format(step).rpartition("/")[2])
    done = run(tmp_path / "again", steps=2, **STALE, **replayed(tmp_path / "replay"), **{"data.evaluation": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [m["sync/log_prob_difference"] < 1e-5 for m in metrics(tmp_path / "again")] == [True, True]
    assert not descendants_with(str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_faults_end_or_continue_as_on_policy(tmp_path):
    """Two ranks; the only server is killed, then SIGTERM, then too many lost servers, then the end."""
    output = tmp_path / "run"
    killed, stopped, ended = survive(output, STALE)

    for step in steps(output):
        rollouts = load_rollouts(output / "rollouts" / f"step_{step:06d}.jsonl")
        assert [r.group for r in rollouts] == [g for g in range(PROMPTS) for _ in range(PER_PROMPT)]
        fresh = step in (1, stopped + 1, ended + 1)  # the first batch of each start
        allowed = {step - 1} if fresh else {step - 2, step - 1} if step in (killed + 1, killed + 2) else {step - 2}
        assert versions(output, step) <= allowed, step
    assert all(math.isfinite(row["loss/importance"]) for row in rows(output) if "loss/importance" in row)
    assert not descendants_with(str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_end_in_the_middle_leaves_nothing_behind(tmp_path):
    """Training fails while the next batch is being sampled."""
    done = run(tmp_path / "run", **STALE, max_log_prob_difference=1e-12, max_skipped_steps=0)
    assert done.returncode == 1 and "1 in a row are too many" in done.stderr, done.stderr[-3000:]
    assert [m["step"] for m in metrics(tmp_path / "run") if "optimizer/updates" in m] == [1]
    assert not descendants_with(str(tmp_path))
