#!/usr/bin/env bash
# CL-EGRSD on Qwen3-30B-A3B, a mixture of 128 experts: the 8B script with expert parallelism. Not run on a GPU yet; where
# the GPUs should go and what a step takes by arithmetic: python tools/plan.py --models Qwen3-30B-A3B --gpus 64
#
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MODEL=... DATA=... bash examples/run_qwen3_30b_a3b_cl_egrsd.sh
set -euo pipefail

export MODEL="${MODEL:-models/Qwen3-30B-A3B}"
export OUTPUT="${OUTPUT:-runs/qwen3-30b-a3b-cl-egrsd}"
export TENSOR="${TENSOR:-4}"                # splits attention, embedding and LM head, no expert
export EXPERT="${EXPERT:-8}"                # 16 experts a rank
export ENGINE_TENSOR="${ENGINE_TENSOR:-4}"  # 61 GB of weights in bf16

exec bash "$(dirname "${BASH_SOURCE[0]}")/run_qwen3_8b_cl_egrsd.sh" "$@"
