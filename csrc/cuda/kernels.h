// The CUDA row kernels: raw pointers and a stream, so that host code needs neither CUDA's nor torch's headers.
#pragma once
#include <cstdint>

#include "../common/statistics.h"

namespace egrsd::cuda {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

struct Logits {
  const void* data;  // [rows, columns], unit column stride
  Dtype dtype;
  int64_t row_stride;  // in elements
  int64_t rows, columns, valid, vocab_start;
  const int64_t* target;  // [rows] global ids, or kIgnoreIndex
  double inverse_temperature;
};

// Blocks that share a row, so that few rows still fill the device; the workspace is [rows, splits] when it is above 1.
int splits_for(int64_t rows, int64_t valid, int multiprocessors);
int multiprocessors(int device);

// Each returns a cudaError_t, 0 for success. They only enqueue work on `stream` (a cudaStream_t).
int statistics(const Logits&, int splits, Statistics* workspace, Statistics* out, void* stream);
int combine(const Statistics* parts, int64_t ranks, int64_t rows, Statistics* whole, float* log_prob, float* entropy,
            void* stream);
// `grad` has the logits' dtype and may be the logits; `grad_entropy` may be null.
int logits_grad(const Logits&, const Statistics* whole, const float* grad_log_prob, const float* grad_entropy,
                void* grad, int64_t grad_stride, void* stream);

const char* error_name(int error);

}  // namespace egrsd::cuda
