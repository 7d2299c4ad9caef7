// The CPU row kernels. No torch, no threads: each call is serial over the rows and columns it is given.
#pragma once
#include <cstdint>

#include "../common/logits.h"

namespace egrsd::cpu {

// Statistics of columns [column_first, column_last) of rows [row_first, row_last) into out[0 .. row_last - row_first).
void statistics(const Logits&, int64_t row_first, int64_t row_last, int64_t column_first, int64_t column_last,
                Statistics* out);

// Gradient of rows [row_first, row_last): zeros in padded columns and in rows whose target is ignored.
void logits_grad(const Logits&, const Gradient&, int64_t row_first, int64_t row_last);

// The instruction set in use: the best this processor has, or MEGATRON_EGRSD_SIMD=avx512|avx2|portable if it has that.
const char* instruction_set();

// The benchmark's floors: read, and read + write in place, `bytes` of memory (a multiple of 64).
float read_floor(const void* data, int64_t bytes);
void read_write_floor(void* data, int64_t bytes);

}  // namespace egrsd::cpu
