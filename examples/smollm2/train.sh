#!/usr/bin/env bash
# The two parts of `make demo-llm`: train.sh OUTPUT [options of both, such as --seed 1]. Needs runs/smollm2 (README.md).
set -euo pipefail
output=${1:?train.sh OUTPUT [options]}
shift
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=2  # one training rank on two cores
megatron-egrsd train --config examples/configs/smollm2_cpu_warm_start.yaml --output "$output/warm_start" "$@"
megatron-egrsd train --config examples/configs/smollm2_cpu.yaml --model.path "$output/warm_start/hf" \
  --output "$output/cl_egrsd" "$@"
megatron-egrsd report --tokens "$output/cl_egrsd"
