// The CPU row kernels. No torch, no threads: each call is serial over the rows and columns it is given.
#pragma once
#include <cstdint>

#include "../common/statistics.h"

namespace egrsd::cpu {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

struct Logits {
  const void* data;  // [rows, columns], unit column stride
  Dtype dtype;
  int64_t row_stride;     // in elements
  int64_t columns;        // of this shard, padding included
  int64_t valid;          // columns that are real tokens: the first `valid`
  int64_t vocab_start;    // global id of the first column
  const int64_t* target;  // [rows] global ids, or kIgnoreIndex
  double inverse_temperature;
};

// Statistics of columns [column_first, column_last) of rows [row_first, row_last) into out[0 .. row_last - row_first).
void statistics(const Logits&, int64_t row_first, int64_t row_last, int64_t column_first, int64_t column_last,
                Statistics* out);

struct Gradient {
  void* data;  // [rows, columns] of the logits' dtype; may be the logits themselves
  int64_t row_stride;
  const Statistics* whole;     // [rows], of the whole vocabulary
  const float* grad_log_prob;  // [rows]
  const float* grad_entropy;   // [rows], or null
};

// Gradient of rows [row_first, row_last): zeros in padded columns and in rows whose target is ignored.
void logits_grad(const Logits&, const Gradient&, int64_t row_first, int64_t row_last);

// The instruction set in use: the best this processor has, or MEGATRON_EGRSD_SIMD=avx512|avx2|portable if it has that.
const char* instruction_set();

// The benchmark's floors: read, and read + write in place, `bytes` of memory (a multiple of 64).
float read_floor(const void* data, int64_t bytes);
void read_write_floor(void* data, int64_t bytes);

}  // namespace egrsd::cpu
