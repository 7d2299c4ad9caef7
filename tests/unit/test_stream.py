"""Choice of the groups that a step trains, with partial rollouts: age is bounded, none is lost or trained twice."""

import dataclasses
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_egrsd.config import Config, DataConfig, ModelConfig, ObjectiveConfig, RolloutConfig
from megatron_egrsd.data.problems import Place, batch_indices
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, load_rollouts, save_rollouts
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rollout.generation import Generation
from megatron_egrsd.sampling.batches import check_versions
from megatron_egrsd.sampling.partial_batches import Group, PartialBatches, complete_batch

PROMPTS = [Prompt(Problem(str(i), "p", "a"), [5], [5]) for i in range(7)]
ROLLOUT = Rollout(PROMPTS[0], 0, [7, 8, 9], [0.0] * 3, "stop", 4, segments=[[4, 2], [6, 1]])


def group(*responses: tuple[list[list[int]], bool]) -> Group:
    """Make a group from each response's segments and whether it is finished."""
    made = [Generation([7] * sum(n for _, n in s), [], "stop" if end else "abort", s) for s, end in responses]
    return Group(PROMPTS[0], made, [ROLLOUT] if all(end for _, end in responses) else [])


LONG = group(([[0, 9], [1, 9]], True), ([[0, 9], [1, 9]], False))
WAITING = group(([], False), ([], False))


def finished(version: int) -> Group:
    return group(([[version, 3]], True), ([[version + 1, 3]], True))


def test_what_is_finished_is_taken_first_while_a_long_one_is_carried_over():
    groups = [LONG, new := finished(1), old := finished(0), WAITING]
    assert complete_batch(groups, 1, 2, 2) == [new, old]  # the batch, in the order of the problems
    assert complete_batch(groups, 1, 1, 2) == [old]  # the oldest first
    assert complete_batch(groups, 1, 3, 2) == []


def test_a_batch_waits_for_what_would_be_too_old_in_the_next_step():
    groups = [LONG, finished(1), finished(1), WAITING]
    assert [len(complete_batch(groups, step, 2, 2)) for step in (0, 1, 2)] == [2, 2, 0]
    LONG_ENDED = group(*[([[0, 9], [1, 9], [2, 1]], True)] * 2)
    assert complete_batch([LONG_ENDED, *groups[1:]], 2, 2, 2) == [LONG_ENDED, groups[1]]


@settings(max_examples=200)
@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_the_bound_is_exact_and_every_group_is_trained_once(data, size, staleness):
    """An adversary lets any group start, continue or finish at any time, while a batch is awaited and in training."""
    extra = data.draw(st.integers(0, size if staleness > 1 else 0))
    steps = data.draw(st.integers(1, 12))
    first = data.draw(st.integers(0, steps - 1))  # where the run resumes
    rollout = RolloutConfig(
        prompts_per_step=size, rollouts_per_prompt=2, staleness=staleness, partial=True, extra_prompts=extra
    )
    config = Config(
        ModelConfig("m"), DataConfig(train="d"), ObjectiveConfig(importance_cap=2.0), rollout=rollout, steps=steps
    )
    batches = PartialBatches(None, None, rollout, config.steps, config.seed, Place(first, first * size))

    def sample(some: list[Group], version: int, finish: bool) -> None:
        for g in some:
            for j, response in enumerate(g.responses):
                more = Generation([7], [0.0], "stop" if finish else "abort", [[version, 1]])
                g.responses[j] = response if response.finished else response.continued(more)
            if finish:
                g.rollouts = [Rollout(g.prompt, 0, r.response_ids, [], "stop", r.weight_version) for r in g.responses]

    chance = random.Random(data.draw(st.integers(0, 1000)))
    finishing = data.draw(st.sampled_from([0.0, 0.2, 0.6]))

    def disturb(version: int) -> None:
        for g in [g for g in batches.groups if not g.rollouts and chance.random() < 0.8]:
            sample([g], version, finish=chance.random() < finishing)

    trained, oldest = [], []
    for step in range(first, steps):
        batches.ahead(PROMPTS, step)
        assert len(batches.groups) == min(size + extra, (steps - step) * size)
        disturb(step)
        while not (chosen := complete_batch(batches.groups, step, size, staleness)):
            unfinished = [g for g in batches.groups if not g.rollouts]
            assert unfinished
            sample(unfinished[-1:], step, finish=True)  # the youngest: the worst that can happen to the old ones
        assert len(chosen) == size
        check_versions([r for g in chosen for r in g.rollouts], step, staleness)
        oldest.append(step - min(g.oldest for g in chosen))
        trained += chosen
        batches.groups = [g for g in batches.groups if g not in chosen]
        if step + 1 < steps:
            batches.ahead(PROMPTS, step + 1)
        disturb(step)
    assert not batches.groups and len(trained) == len(set(map(id, trained)))
    expected = [batch_indices(len(PROMPTS), 1, p, config.seed)[0] for p in range(first * size, steps * size)]
    assert sorted(int(g.prompt.problem.id) for g in trained) == sorted(expected)
    assert max(oldest) <= staleness


def test_tokens_too_old_or_too_new_end_the_run():
    check_versions([ROLLOUT], 6, 2)
    with pytest.raises(RunError, match=r"version 4, but the engine holds version 7; .* allows versions from 5 on"):
        check_versions([ROLLOUT], 7, 2)
    with pytest.raises(RunError, match="version 6, but the engine holds version 5"):
        check_versions([ROLLOUT], 5, 2)


def test_dumps_hold_the_segments_and_older_ones_none(tmp_path):
    plain = dataclasses.replace(ROLLOUT, segments=[])
    save_rollouts([ROLLOUT, plain], tmp_path / "now.jsonl")
    assert load_rollouts(tmp_path / "now.jsonl") == [ROLLOUT, plain]
    assert (ROLLOUT.versions, plain.versions) == ([[4, 2], [6, 1]], [[4, 3]])
    row = json.loads((tmp_path / "now.jsonl").read_text().splitlines()[1])
    del row["segments"]
    (tmp_path / "before.jsonl").write_text(json.dumps(row) + "\n")
    assert load_rollouts(tmp_path / "before.jsonl") == [plain]


@pytest.mark.parametrize("segments", [[[4, 2]], [[6, 2], [4, 1]], [[3, 3]], [[4, 3], [5, 0]], [[4, "2"]], None, [4, 3]])
def test_segments_that_do_not_fit_the_response_are_refused(segments, tmp_path):
    save_rollouts([dataclasses.replace(ROLLOUT, segments=segments)], tmp_path / "x.jsonl")
    with pytest.raises(BadArgument, match="line 1: not a rollout"):
        load_rollouts(tmp_path / "x.jsonl")
