#!/usr/bin/env bash
# CL-EGRSD on Qwen3-30B-A3B, a mixture of 128 experts: the 8B script with a configuration of its own. Not run on a
# GPU yet. Layouts and the time of a step, by arithmetic: megatron-egrsd plan --models Qwen3-30B-A3B --gpus 64
#
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MODEL=... DATA=... bash examples/run_qwen3_30b_a3b_cl_egrsd.sh
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export MODEL="${MODEL:-models/Qwen3-30B-A3B}"
export OUTPUT="${OUTPUT:-runs/qwen3-30b-a3b-cl-egrsd}"
export CONFIG="${CONFIG:-$here/configs/qwen3_30b_a3b_cl_egrsd.yaml}"  # layout and hyper-parameters

exec bash "$here/run_qwen3_8b_cl_egrsd.sh" "$@"
