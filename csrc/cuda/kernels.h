// The CUDA row kernels: raw pointers and a stream, so that host code needs neither CUDA's nor torch's headers.
#pragma once
#include <cstdint>

#include "../common/logits.h"

namespace egrsd::cuda {

// Blocks that share a row, so that few rows still fill the device; the workspace is [rows, splits] when it is above 1.
int splits_for(int64_t rows, int64_t valid, int multiprocessors);
int multiprocessors(int device);

// Each returns a cudaError_t, 0 for success. They only enqueue work on `stream` (a cudaStream_t).
int statistics(const Logits&, int splits, Statistics* workspace, Statistics* out, void* stream);
int combine(const Statistics* parts, int64_t ranks, int64_t rows, Statistics* whole, float* log_prob, float* entropy,
            float* log_normalizer, void* stream);
int logits_grad(const Logits&, const Gradient&, void* stream);

const char* error_name(int error);

}  // namespace egrsd::cuda
