"""The start of the ranks: their groups, and that all have the same code, configuration and data."""

import dataclasses
from datetime import timedelta

import pytest
import torch

from megatron_egrsd.config import ParallelConfig
from megatron_egrsd.data.samples import Problem, Prompt
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.run.agreement import HINTS, facts
from tests.models import make_qwen3
from tests.ranks import run_ranks
from tests.training import VOCAB, open_engine, training_config

PROMPTS = [Prompt(Problem("a", "1 + 1", "2"), [1, 2], [1, 3, 2])]


def _timeout(rank, world_size, parallel):
    from megatron.core import parallel_state

    from megatron_egrsd.engine import distributed

    distributed.initialize(parallel, seed=0)
    group = parallel_state.get_tensor_model_parallel_group()
    return group._get_backend(torch.device("cpu")).options._timeout


def test_the_groups_of_the_model_wait_as_long_as_asked():
    assert run_ranks(_timeout, 1, ParallelConfig(timeout=119.5)) == [timedelta(seconds=119.5)]


def _start(rank, world_size, config, name):

    own = facts(config, PROMPTS)
    if rank == 1 and name == "configuration":
        own = facts(dataclasses.replace(config, seed=1), PROMPTS)
    elif rank == 1 and name == "data":
        own = facts(config, [dataclasses.replace(PROMPTS[0], student_ids=[1, 4])])
    elif rank == 1 and name:
        own[name] = ("other", HINTS[name])
    try:
        with open_engine(config, own):
            return ""
    except BadArgument as error:
        return str(error)


@pytest.mark.parametrize("name", ["", *HINTS])
def test_the_rank_that_differs_is_named_on_all(name, tmp_path):
    config = training_config(make_qwen3(tmp_path / "model", vocab_size=VOCAB))
    said = run_ranks(_start, 2, config, name)
    assert len(set(said)) == 1
    assert ("rank 1 on " in said[0] and f"other {name} than rank 0" in said[0]) if name else said[0] == ""
