// Where the rows of logits and of their gradient lie: raw memory, so that no kernel knows torch. For CPU and CUDA.
#pragma once
#include <cstdint>

#include "statistics.h"

namespace egrsd {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// Rows counted over two dimensions that need not merge: logits[:, :-1] and logits.transpose(0, 1) are such rows.
struct RowLayout {
  int64_t inner_rows;                  // rows of the inner dimension; all of them if there is one dimension only
  int64_t outer_stride, inner_stride;  // in elements

  EGRSD_HOST_DEVICE int64_t offset(int64_t row) const {
    if (row < inner_rows) return row * inner_stride;  // always so with one dimension, which then costs no division
    return row / inner_rows * outer_stride + row % inner_rows * inner_stride;
  }
};

struct Logits {
  const void* data;  // [rows, columns], unit column stride
  Dtype dtype;
  RowLayout layout;
  int64_t rows;
  int64_t columns;           // of this shard, padding included
  int64_t valid;             // columns that are real tokens: the first `valid`
  int64_t vocab_start;       // global id of the first column
  const int64_t* target;     // [rows] global ids, or kIgnoreIndex; null: no target
  const float* temperature;  // [rows], or null: one temperature for all
  double inverse_temperature;

  EGRSD_HOST_DEVICE int64_t target_of(int64_t row) const { return target ? target[row] : kNoTarget; }
  EGRSD_HOST_DEVICE double inverse_temperature_of(int64_t row) const {
    return temperature ? 1.0 / double(temperature[row]) : inverse_temperature;
  }
};

struct Gradient {
  void* data;  // [rows, columns] of the logits' dtype; may be the logits themselves
  RowLayout layout;
  const Statistics* whole;           // [rows], of the whole vocabulary
  const float* grad_log_prob;        // [rows]
  const float* grad_entropy;         // [rows], or null
  const float* grad_log_normalizer;  // [rows], or null

  EGRSD_HOST_DEVICE GradientCoefficients coefficients(int64_t row, double inverse_temperature) const {
    return gradient_coefficients(whole[row], grad_log_prob[row], grad_entropy ? grad_entropy[row] : 0.f,
                                 grad_log_normalizer ? grad_log_normalizer[row] : 0.f, inverse_temperature);
  }
};

}  // namespace egrsd
