#!/usr/bin/env bash
# Qwen3-30B-A3B: a plan, not a run. The engine converts mixtures of experts and builds their shards; it does not train
# them yet. This prints how GPUS would be divided, the memory of a GPU and the time of a step (docs/scaling.md).
#
#   GPUS=64 MACHINE=H200 bash examples/run_qwen3_30b_a3b_plan.sh
set -euo pipefail

MODEL="${MODEL:-Qwen3-30B-A3B}"  # the published sizes, or a directory with a config.json
GPUS="${GPUS:-64}"               # in all: those that train and those that serve
MACHINE="${MACHINE:-H100}"       # H100 or H200

exec python "$(dirname "${BASH_SOURCE[0]}")/../tools/plan.py" --models "$MODEL" --gpus "$GPUS" --machine "$MACHINE" "$@"
