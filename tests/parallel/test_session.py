"""The session of a run on two ranks, where rank 0 alone writes."""

from types import SimpleNamespace

import torch.distributed as dist

from megatron_egrsd.data.samples import Problem, Prompt, Rollout
from megatron_egrsd.errors import RunError
from tests.ranks import run_ranks


def _evaluate_on_a_full_disk(rank, world_size):
    """Return (the error of this rank, the evaluations that count as made)."""
    from megatron_egrsd.run.session import Session

    def full(*_):
        raise RunError("no space left")

    dist.init_process_group("gloo")
    rollout = Rollout(Prompt(Problem("0", "p", "a"), [5], [5]), 0, [7], [0.0], "stop", 0, "", 1.0)
    session = Session.__new__(Session)
    session.engine = SimpleNamespace(is_first_rank=rank == 0)
    session.rollouts = SimpleNamespace(evaluation=lambda *_: [rollout])
    session.evaluations, session.log = [], SimpleNamespace(evaluation=full) if rank == 0 else None
    try:
        session.evaluate([rollout.prompt], 3)
        return "", session.evaluations
    except RunError as error:
        return str(error), session.evaluations
    finally:
        dist.destroy_process_group()


def test_an_evaluation_that_cannot_be_written_stops_every_rank():
    """Rank 0 alone would wait for the others in the collectives of a checkpoint."""
    assert run_ranks(_evaluate_on_a_full_disk, 2, timeout=60) == [("no space left", [])] * 2
