#!/usr/bin/env bash
# On a machine with the environment of `make install` and a package registry: what a GPU machine without network has to
# be brought, at most 64 MiB, as build/gpu/bundle.tar.xz. Checks the size, and the imports in a clean directory.
# PYTHON is the environment's interpreter (default: python), PYTHON312 one of the version that the GPU machine has.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python}" -m tools.gpu.bundle
