"""benchmarks/check_training.py, which is written for a GPU, as far as a CPU goes."""

import pytest

from tests.ranks import run_ranks


def _check(rank, world_size, dtype, directory):
    from benchmarks.check_training import check, table

    result = check("tiny", dtype, directory)
    return result.differences, table([result])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_it_reports_the_difference_to_fp32(dtype, limit, tmp_path):
    [(differences, table)] = run_ranks(_check, 1, dtype, tmp_path)
    assert 0 < differences[0] < limit and len(differences) == 3
    assert f"| tiny | 0.3M | {dtype} |" in table
