#!/usr/bin/env bash
# Checks the CUDA kernels on a machine without a GPU: every architecture compiles with warnings as errors, no kernel
# spills registers, the disassembly has 128-bit loads and stores, the bindings compile and link against them.
#   tools/check_cuda.sh [sm_90]  needs nvcc (CUDA_HOME, /usr/local/cuda or PATH); says so and exits 0 without one
# PYTHON chooses the interpreter whose headers, and pybind11 or torch, the bindings are compiled with (default: python).
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
[[ -x $nvcc ]] || nvcc=$(command -v nvcc || true)
[[ -n $nvcc ]] || { echo "check_cuda: skipped, there is no nvcc on this machine"; exit 0; }
bin=$(dirname "$(readlink -f "$nvcc")")
build=build/check_cuda
mkdir -p "$build"
# NVDISASM, the toolkit's, or the one of `pip install nvidia-cuda-nvdisasm`
nvdisasm=${NVDISASM:-$bin/nvdisasm}
[[ -x $nvdisasm ]] || nvdisasm=$(command -v nvdisasm || ${PYTHON:-python} -c 'import glob, sysconfig
print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/bin/nvdisasm")[:1])')

architectures=("$@")
((${#architectures[@]})) || architectures=(sm_80 sm_90 sm_100)
compile() {
  local name=$build/$1.$2
  "$nvcc" -std=c++17 -O3 -Werror all-warnings -Xptxas -v,-warn-spills,-warn-lmem-usage \
    -cubin -arch="$1" "csrc/cuda/$2.cu" -o "$name.cubin" 2> "$name.log" \
    || { cat "$name.log"; echo "check_cuda: $1 does not compile" >&2; return 1; }
}
for arch in "${architectures[@]}"; do
  for source in kernels divergence; do compile "$arch" "$source" & done
done
for job in $(jobs -p); do wait "$job"; done

for arch in "${architectures[@]}"; do
  cat "$build/$arch".{kernels,divergence}.log > "$build/$arch.log"
  kernels=$(grep -c 'bytes spill stores' "$build/$arch.log")
  if grep 'bytes spill stores' "$build/$arch.log" | grep -v ' 0 bytes spill stores, 0 bytes spill loads'; then
    echo "check_cuda: $arch spills registers, see $build/$arch.log" >&2
    exit 1
  fi
  registers=$(grep -o 'Used [0-9]* registers' "$build/$arch.log" | sort -k2 -n | tail -1)
  widths="no nvdisasm, 128-bit accesses not looked for"
  if [[ -n $nvdisasm ]]; then
    for source in kernels divergence; do "$nvdisasm" -c "$build/$arch.$source.cubin"; done > "$build/$arch.sass"
    loads=$(grep -cE 'LDG\.E.*\.128' "$build/$arch.sass" || true)
    stores=$(grep -cE 'STG\.E.*\.128' "$build/$arch.sass" || true)
    # Of one tensor: three forward kernels with kUnroll + 1 loads each; six backward ones with as many loads and stores.
    # Of two: kPairUnroll + 1 of each tensor, in six near, three general and nine entry kernels; 18 gradients store too.
    if ((loads < 9 * 5 + (6 + 3 + 9 + 18) * 6 || stores < 6 * 5 + 18 * 3)); then
      echo "check_cuda: $arch has $loads 128-bit loads and $stores stores, fewer than the kernels ask for" >&2
      exit 1
    fi
    widths="$loads 128-bit loads, $stores 128-bit stores"
  fi
  echo "check_cuda: $arch ok: $kernels kernels, no spills, at most ${registers#Used }, $widths"
done

read -r python_include pybind11_include < <(${PYTHON:-python} -c 'import sysconfig
import importlib.util, pathlib
found = importlib.util.find_spec("pybind11") or importlib.util.find_spec("torch")
print(sysconfig.get_paths()["include"], pathlib.Path(found.origin).parent / "include")')
for source in module divergence; do
  ${CXX:-g++} -std=c++17 -O1 -fPIC -Wall -Wextra -Werror -DEGRSD_CUDA -isystem "$python_include" \
    -isystem "$pybind11_include" -c "csrc/bind/$source.cpp" -o "$build/$source.o"
done
"$nvcc" -std=c++17 -O1 -Xptxas -O1 -Xcompiler -fPIC -arch=sm_90 -cudart static -shared csrc/cuda/{kernels,divergence}.cu \
  "$build"/{module,divergence}.o -o "$build/libcuda_part.so"
echo "check_cuda: bindings compile and link"
