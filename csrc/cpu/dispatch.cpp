// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "scalar.h"

namespace egrsd::cpu {
namespace {

bool supported(const RowKernels* kernels) {
  if (!kernels) return false;
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (kernels == avx512_bf16_kernels()) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (kernels == avx512_kernels()) return avx512;
  if (kernels == avx2_kernels())
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return kernels == portable_kernels();
}

const RowKernels& choose() {
  const RowKernels* const best_first[] = {avx512_bf16_kernels(), avx512_kernels(), avx2_kernels(), portable_kernels()};
  if (const char* wanted = std::getenv("MEGATRON_EGRSD_SIMD"))
    for (const RowKernels* kernels : best_first)
      if (supported(kernels) && std::strcmp(kernels->name, wanted) == 0) return *kernels;
  for (const RowKernels* kernels : best_first)
    if (supported(kernels)) return *kernels;
  return *portable_kernels();
}

const RowKernels& kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

}  // namespace

const char* instruction_set() { return kernels().name; }

void statistics(const Logits& logits, int64_t row_first, int64_t row_last, int64_t column_first, int64_t column_last,
                Statistics* out) {
  kernels().statistics(logits, row_first, row_last, column_first, column_last, out);
}

void logits_grad(const Logits& logits, const Gradient& gradient, int64_t row_first, int64_t row_last) {
  kernels().logits_grad(logits, gradient, row_first, row_last);
}

void pair_statistics(const Pair& pair, bool other_entropy, int64_t row_first, int64_t row_last, int64_t column_first,
                     int64_t column_last, PairStatistics* out) {
  kernels().pair.statistics(pair, other_entropy, row_first, row_last, column_first, column_last, out);
}

void entry_sums(const Pair& pair, const Entries& entries, int64_t row_first, int64_t row_last, int64_t column_first,
                int64_t column_last, EntrySums* out) {
  kernels().pair.entry_sums(pair, entries, row_first, row_last, column_first, column_last, out);
}

void pair_gradient(const Pair& pair, const Entries& entries, const PairGradient& gradient, int64_t row_first,
                   int64_t row_last) {
  kernels().pair.gradient(pair, entries, gradient, row_first, row_last);
}

// Four independent 64-byte streams of plain vector code: as fast as the memory, on every processor tried.
typedef int32_t Line __attribute__((vector_size(64), aligned(4), may_alias));

float read_floor(const void* data, int64_t bytes) {
  const Line* p = static_cast<const Line*>(data);
  Line sums[4] = {};
  const int64_t lines = bytes / 64;
  for (int64_t i = 0; i + 4 <= lines; i += 4) {
    __builtin_prefetch(reinterpret_cast<const char*>(p + i) + 4096);
    __builtin_prefetch(reinterpret_cast<const char*>(p + i) + 4160);
    __builtin_prefetch(reinterpret_cast<const char*>(p + i) + 4224);
    __builtin_prefetch(reinterpret_cast<const char*>(p + i) + 4288);
    for (int k = 0; k < 4; ++k) sums[k] ^= p[i + k];
  }
  const Line all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  int32_t x = 0;
  for (int k = 0; k < 16; ++k) x ^= all[k];
  return float(x);
}

void read_write_floor(void* data, int64_t bytes) {
  Line* p = static_cast<Line*>(data);
  for (int64_t i = 0; i < bytes / 64; ++i) p[i] ^= 1;
}

}  // namespace egrsd::cpu
