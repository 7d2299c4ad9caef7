#!/usr/bin/env bash
# CL-EGRSD on Qwen3-4B: the 8B script and hyper-parameters with half the tensor parallelism. Not run on a GPU yet.
set -euo pipefail

export MODEL="${MODEL:-models/Qwen3-4B}"
export OUTPUT="${OUTPUT:-runs/qwen3-4b-cl-egrsd}"
export TENSOR="${TENSOR:-2}"  # 4.0e9 x 18 bytes: 36 GB a GPU before DP shards the optimizer

exec bash "$(dirname "${BASH_SOURCE[0]}")/run_qwen3_8b_cl_egrsd.sh" "$@"
