#!/usr/bin/env bash
# CL-EGRSD on Qwen3-4B: the 8B script with a configuration of its own. Not run on a GPU yet.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export MODEL="${MODEL:-models/Qwen3-4B}"
export OUTPUT="${OUTPUT:-runs/qwen3-4b-cl-egrsd}"
export CONFIG="${CONFIG:-$here/configs/qwen3_4b_cl_egrsd.yaml}"  # layout and hyper-parameters
export FULL_TENSOR="${FULL_TENSOR:-2}"  # TP for all weights (LORA_RANK=0)

exec bash "$here/run_qwen3_8b_cl_egrsd.sh" "$@"
