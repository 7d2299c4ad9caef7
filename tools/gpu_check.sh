#!/usr/bin/env bash
# On a CUDA machine, in one command and without network: build the kernels, run tests/gpu, write the GPU table.
#   tools/gpu_check.sh            PYTHON chooses the interpreter (default: python); needs torch >= 2.6 with CUDA, nvcc,
#                                 setuptools and pytest in it; trains where megatron-core and transformers are, too
# Leaves docs/measurements/performance-cuda.md, docs/measurements/performance-cuda.png and docs/measurements/training-cuda.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())'
"$python" setup.py -q build_ext --inplace
"$python" - <<'CHECK'
import torch
from megatron_egrsd.vocab_parallel import ops
assert ops.compiled(torch.device("cuda")), "the build above left the CUDA part out; see its warning"
CHECK
# Only what these tests need: pytest's plugins and the project's other dependencies may be missing here. What
# test_training.py asserts, check_training.py does as well.
"$python" -m pytest -q -o addopts= tests/gpu --ignore tests/gpu/test_training.py
"$python" -m benchmarks.vocab_parallel --device cuda --output docs/measurements/performance
if missing=$(PYTHONPATH=. "$python" -c 'import transformers, tools.check_training' 2>&1); then
    PYTHONPATH=. "$python" tools/check_training.py --models tiny 0.6B --output docs/measurements/training-cuda.md
else
    echo "nothing was trained: ${missing##*$'\n'}"
fi
