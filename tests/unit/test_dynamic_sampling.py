"""Groups without a signal are replaced by fresh prompts, as often as asked, and the same way every time."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_egrsd.config import Config, DataConfig, ModelConfig, ObjectiveConfig, RolloutConfig
from megatron_egrsd.data.problems import Place, problem_indices
from megatron_egrsd.data.samples import Problem, Prompt, Rollout
from megatron_egrsd.rollout.servers import ServersLost
from megatron_egrsd.sampling.batches import BatchSampling

PROMPTS = [Prompt(Problem(str(i), "p", "a"), [5], [5]) for i in range(40)]


class Sampled:
    """A stand-in for SGLang: problems below `dull` are always answered wrongly, the others every other time."""

    def __init__(self, dull: int):
        self.dull, self.asked = dull, []

    def __call__(self, prompts: list[Prompt], done: dict) -> list[Rollout]:
        self.asked.append([int(p.problem.id) for p in prompts])
        return [
            Rollout(p, group, [7], [0.0], "stop", 0, "", float(k % 2 and int(p.problem.id) >= self.dull))
            for group, p in enumerate(prompts)
            for k in range(4)
        ]


class Breaking(Sampled):
    """Loses its servers once, in round `lost`, when it has one response, with which it must be asked again."""

    def __init__(self, dull: int, lost: int):
        super().__init__(dull)
        self.lost = lost

    def __call__(self, prompts, done):
        if len(self.asked) == self.lost and not done:
            done[0, 0] = "one response"
            raise ServersLost("no server is left")
        assert bool(done) == (len(self.asked) == self.lost)
        return super().__call__(prompts, done)


def config(rounds: int, **objective) -> Config:
    rollout = RolloutConfig(prompts_per_step=8, rollouts_per_prompt=4, dynamic_sampling=rounds)
    objective = ObjectiveConfig(**{"advantage": "group"} | objective)
    return Config(ModelConfig("m"), DataConfig(train="d"), objective, rollout=rollout)


def sampling_of(sample, config: Config, step: int) -> BatchSampling:
    return BatchSampling(sample, PROMPTS, config.rollout, config.objective, config.seed, step, Place())


def batch(sample, config: Config, step: int) -> tuple[list[Rollout], int]:
    result = sampling_of(sample, config, step).result()
    return result.rollouts, result.sampled


def wrong_groups(rollouts: list[Rollout]) -> set[int]:
    return {r.group for r in rollouts} - {r.group for r in rollouts if r.reward}


@pytest.mark.parametrize("step", [0, 3])
def test_a_batch_is_refilled_until_it_has_a_signal(step):
    first = Sampled(dull=20)
    rollouts, sampled = batch(first, config(20), step)
    assert not wrong_groups(rollouts)
    assert [r.group for r in rollouts] == [g for g in range(8) for _ in range(4)]
    assert sampled == 4 * sum(map(len, first.asked)) > 32
    assert all(len({r.prompt.problem.id for r in rollouts if r.group == g}) == 1 for g in range(8))
    again = Sampled(dull=20)
    batch(again, config(20), step)
    assert again.asked == first.asked  # a resumed run draws the same prompts


def test_no_more_rounds_than_asked_and_none_by_default():
    first = Sampled(dull=40)
    rollouts, sampled = batch(first, config(2), 0)
    assert len(first.asked) == 3 and sampled == 96 and len(wrong_groups(rollouts)) == 8
    first = Sampled(dull=40)
    assert batch(first, config(0), 0)[1] == 32 and len(first.asked) == 1


def test_an_objective_that_learns_from_any_outcome_needs_no_refill():
    first = Sampled(dull=40)
    batch(first, config(5, advantage="outcome"), 0)
    assert len(first.asked) == 1


@pytest.mark.parametrize("lost", range(3))
def test_servers_lost_in_any_round_leave_the_batch_as_it_would_have_been(lost):
    """Finished rounds stay; the interrupted round continues with the responses that it had."""
    undisturbed = Sampled(dull=25)
    expected = batch(undisturbed, config(5), 1)
    assert len(undisturbed.asked) > 2
    first = Breaking(dull=25, lost=lost)
    sampling = sampling_of(first, config(5), 1)
    with pytest.raises(ServersLost):
        sampling.result()
    result = sampling.result()
    assert (result.rollouts, result.sampled) == expected and first.asked == undisturbed.asked


def test_servers_lost_while_sampling_ahead_are_no_error_once_they_were_awaited():
    """Between the two the servers got new weights: the same version again would be refused."""
    undisturbed = Sampled(dull=0)
    expected = batch(undisturbed, config(0), 1)
    first = Breaking(dull=0, lost=0)
    sampling = sampling_of(first, config(0), 1)
    with ThreadPoolExecutor(1) as thread:
        sampling.start(thread)
        sampling.wait()
        result = sampling.result()
    assert (result.rollouts, result.sampled) == expected and first.asked == undisturbed.asked


def test_a_resumed_run_begins_behind_the_problems_that_its_checkpoint_counts():
    sampled, settings = Sampled(dull=0), config(0)
    begin = Place(2, 4)  # two steps of two prompts; now eight
    BatchSampling(sampled, PROMPTS, settings.rollout, settings.objective, settings.seed, 3, begin).result()
    assert sampled.asked == [problem_indices(len(PROMPTS), 4 + 8, 8, settings.seed)]
