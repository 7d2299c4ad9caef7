"""Training on one GPU: log-probs near fp32, memory as the dry run says. Needs a GPU and megatron-core."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "0.6B"])
def test_one_gpu_trains_and_the_plan_is_right(name, dtype, tmp_path):
    pytest.importorskip("megatron.core")
    from benchmarks.check_training import check

    result = check(name, dtype, tmp_path)
    assert not result.complaint(), result
    assert result.differences[-1] > 0 and result.seconds > 0
