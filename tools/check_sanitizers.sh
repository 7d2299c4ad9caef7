#!/usr/bin/env bash
# Runs the CPU core's own test (csrc/cpu/kernels_check.cpp) under AddressSanitizer and UndefinedBehaviorSanitizer, once
# for every instruction set. Those that this processor lacks fall back to its best one. Needs only a C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/check_sanitizers
mkdir -p "$build"
for source in dispatch simd_avx512 simd_avx2 simd_portable kernels_check; do
  ${CXX:-g++} -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
    -Wall -Wextra -Wno-maybe-uninitialized -Werror -c "csrc/cpu/$source.cpp" -o "$build/$source.o" &
done
for job in $(jobs -p); do wait "$job"; done
${CXX:-g++} -fsanitize=address,undefined "$build"/*.o -o "$build/kernels_check"
for instruction_set in portable avx2 avx512 avx512_bf16; do
  MEGATRON_EGRSD_SIMD=$instruction_set timeout 120 "$build/kernels_check"
done
