"""Partial rollouts: weights change under the responses. Real servers, real ranks, real faults."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.packing import Sequence
from megatron_egrsd.data.problems import batch_indices, load_problems
from megatron_egrsd.data.samples import Rollout, load_rollouts
from tests.end_to_end.test_overlap import CAP, assert_importance
from tests.end_to_end.test_train import descendants_with, metrics, run
from tests.faults.runs import PER_PROMPT, PROMPTS, rows, survive
from tests.ranks import run_ranks
from tests.training import open_engine

PARTIAL = {
    "rollout.partial": "true", "rollout.staleness": 2, "rollout.extra_prompts": 3, "objective.importance_cap": CAP,
    "data.evaluation": "",
}  # fmt: skip


def dumped(output, step: int) -> list[Rollout]:
    return load_rollouts(output / "rollouts" / f"step_{step:06d}.jsonl")


def _log_probs(rank, world_size, output, versions: int) -> list[list[np.ndarray]]:
    """Return the engine's log-probs of every dumped response, by version: 0 the model, then the checkpoints."""
    from megatron_egrsd.engine import checkpoint

    rollouts = [r for step in range(1, versions + 1) for r in dumped(output, step)]
    sequences, found = [Sequence(r.prompt.student_ids, r.response_ids) for r in rollouts], []
    with open_engine(parse_config(["--config", str(output / "config.yaml")])) as engine:
        for version in range(versions):
            if version:
                checkpoint.load(engine, output / "checkpoints" / f"step_{version:06d}")
            scores = engine.score(sequences, [list(range(len(sequences)))])
            found.append([scores[i].log_prob.numpy() for i in range(len(sequences))])
    return found


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_token_is_of_the_version_it_names_and_weighted_for_it(tmp_path):
    output, count = tmp_path / "run", 5
    done = run(output, steps=count, **PARTIAL, **{"checkpoint.every": 1, "checkpoint.keep": count})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    made = [m for m in metrics(output) if "optimizer/updates" in m]
    assert [m["step"] for m in made] == list(range(1, count + 1))
    batches = [dumped(output, step) for step in range(1, count + 1)]
    assert all([r.group for r in batch] == [g for g in range(4) for _ in range(4)] for batch in batches)

    for step, (m, batch) in enumerate(zip(made, batches, strict=True)):
        behind = np.concatenate([[step - version] * tokens for r in batch for version, tokens in r.versions])
        assert behind.min() >= 0 and behind.max() == m["rollout/staleness/max"] <= 2
        assert m["rollout/staleness"] == pytest.approx(behind.mean())
    assert made[0]["rollout/staleness/max"] == 0

    config = parse_config(["--config", str(output / "config.yaml")])
    problems = load_problems(config.data.train, config.data)
    drawn = [problems[i].id for step in range(count) for i in batch_indices(len(problems), 4, step, config.seed)]
    trained = Counter(r.prompt.problem.id for batch in batches for r in batch)
    assert trained == Counter({name: 4 for name in drawn}) and len(trained) == 4 * count  # each once

    engine = run_ranks(_log_probs, 1, output, count, timeout=200)[0]
    others = []  # log-probs by a response's first version of the tokens that later versions sampled
    for i, r in enumerate(r for batch in batches for r in batch):
        versions = np.repeat(*zip(*r.versions, strict=True))
        own = np.array([engine[version][i][t] for t, version in enumerate(versions)])
        errors = np.abs(own - r.rollout_log_probs)  # of one improbable token 1.3e-5 has been seen
        assert errors.mean() < 1e-6 and errors.max() < 3e-5, r.versions
        others += list(np.abs(engine[versions[0]][i] - r.rollout_log_probs)[versions > versions[0]])
    assert len(others) > 50 and np.mean(others) > 1e-3

    assert_importance(output, made)
    assert not descendants_with(str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_faults_end_or_continue_as_on_policy(tmp_path):
    """Two ranks; the only server is killed, then SIGTERM, then too many lost servers, then the end."""
    output = tmp_path / "run"
    _, stopped, ended = survive(output, PARTIAL)

    starts = [0, stopped, ended, ended + 2]
    for start, end in itertools.pairwise(starts):
        problems = []
        for step in range(start, end):
            rollouts = dumped(output, step + 1)
            assert [r.group for r in rollouts] == [g for g in range(PROMPTS) for _ in range(PER_PROMPT)]
            # A resumed run begins with the weights of its checkpoint.
            allowed = range(max(start, step - 2), step + 1)
            assert all(version in allowed for r in rollouts for version, _ in r.versions), step
            problems += [r.prompt.problem.id for r in rollouts[::PER_PROMPT]]
        assert len(problems) == len(set(problems))
    assert all(math.isfinite(row["loss/importance"]) for row in rows(output) if "loss/importance" in row)
    assert not descendants_with(str(tmp_path))
