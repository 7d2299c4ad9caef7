#!/usr/bin/env bash
# The paper's Tables 2 to 7, A3 and A4: each model untrained and trained by SFT, GRPO, OPSD, CRISP, EGRSD and CL-EGRSD, and
# the ablations on 8B, evaluated by the paper's protocol. Writes one page, OUTPUT/page.html, with ours beside the paper's.
# Not run on a GPU yet. docs/guides/reproduce.md says more.
#
#   MODEL_4B=/models/Qwen3-4B MODEL_8B=/models/Qwen3-8B DATA=/data/train.jsonl BENCHMARKS=/data/benchmarks \
#       bash examples/reproduce_paper.sh --dry-run
#
# Run it on one node or, at the same time, on several that share OUTPUT; start it again and it goes on where it was stopped.
# Relative paths are relative to the repository, wherever it is started.
# Further words: --cells 'table3/*', --seeds 1 2 3, --dry-run, --page-only, ... (--help). Status: 0 if no cell has failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_4B=${MODEL_4B:-}               # Hugging Face directories; a model without one is left out
MODEL_8B=${MODEL_8B:-}
MODEL_ACEREASON=${MODEL_ACEREASON:-}
DATA=${DATA:-data/train.jsonl}       # the paper's set: megatron-egrsd prepare-data
BENCHMARKS=${BENCHMARKS:-data/benchmarks}  # aime24.jsonl, ..., gsm8k.jsonl
OUTPUT=${OUTPUT:-runs/paper}         # every node must see it
GPUS_PER_NODE=${GPUS_PER_NODE:-8}    # 0: one process on the CPU
TRAIN=${TRAIN:-}                     # further words of every training, such as "--steps 10"
EVALUATE=${EVALUATE:-}               # further words of every evaluation
# The environment that is active, else the one of `make install`.
PYTHON=${PYTHON:-$(command -v megatron-egrsd >/dev/null || [ ! -x .venv/bin/python ] &&
    echo python || echo .venv/bin/python)}

exec "$PYTHON" -m benchmarks.reproduce_paper --output "$OUTPUT" --data "$DATA" --benchmarks "$BENCHMARKS" \
    --gpus "$GPUS_PER_NODE" --train="$TRAIN" --evaluate="$EVALUATE" \
    ${MODEL_4B:+--model "4b=$MODEL_4B"} ${MODEL_8B:+--model "8b=$MODEL_8B"} \
    ${MODEL_ACEREASON:+--model "acereason=$MODEL_ACEREASON"} "$@"
