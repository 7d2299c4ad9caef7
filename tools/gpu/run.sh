#!/usr/bin/env bash
# On a GPU machine without network: everything that only a GPU can tell, in order of value, within MINUTES.
#   tools/gpu/run.sh 15                      a second call goes on where the first one ended
#   tools/gpu/run.sh 5 --only kernel-speed   one stage, also if it is done
#   DEVICE=cpu tools/gpu/run.sh 30           the same stages on the CPU, at tiny sizes
# PYTHON chooses the interpreter (default: python3). Results: build/gpu/results, or RESULTS.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
site=$PWD/build/gpu/site-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
unset PYTHONDONTWRITEBYTECODE  # set in many images: each stage would compile torch's sources anew
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m tools.gpu.stages "$@" < /dev/null
