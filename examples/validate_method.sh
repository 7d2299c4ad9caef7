#!/usr/bin/env bash
# The validation study: GRPO, EGRSD without gate, EGRSD and CL-EGRSD as the paper has them, and single settings changed, on two
# tasks that fit a CPU, with paired seeds; and a look at what the gate does. Fills the tables of docs/measurements/results.md.
# Start it again and it goes on where it was stopped. A run that fails is named at the end, and does not stop the others.
# Relative paths are relative to the repository, wherever it is started.
#
#   bash examples/validate_method.sh            OUTPUT=runs/validation LANES=2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUTPUT=${OUTPUT:-runs/validation} # every run with its log, 1 MB each
LANES=${LANES:-2}                 # runs at a time; each wants one core
OBJECTIVE=${OBJECTIVE:-}          # file.py:Class of an objective of yours, to compare with CL-EGRSD (docs/guides/extending.md)
# The environment that is active, else the one of `make install`.
PYTHON=${PYTHON:-$(command -v megatron-egrsd >/dev/null || [ ! -x .venv/bin/python ] &&
    echo python || echo .venv/bin/python)}

export OMP_NUM_THREADS=1
exec "$PYTHON" -m benchmarks.validate_method all --output "$OUTPUT" --lanes "$LANES" --objective "$OBJECTIVE"
