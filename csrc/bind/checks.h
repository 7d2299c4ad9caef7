// The checks of the ops before they access memory; Python makes the same checks with the caller's names (shard.py).
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../common/statistics.h"

namespace egrsd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_logit_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

inline void check_rows(const Tensor& logits, const Tensor& target, int64_t valid) {
  STD_TORCH_CHECK(is_logit_dtype(logits.scalar_type()), "logits must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1),
                  "logits must be [N, V] with contiguous rows");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.dim() == 1 && target.is_contiguous() &&
                      target.size(0) == logits.size(0),
                  "target must be contiguous int64 [N]");
  STD_TORCH_CHECK(valid >= 0 && valid <= logits.size(1), "valid must be in [0, V]");
}

inline void check_per_token(const Tensor& x, int64_t tokens, int64_t width, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == tokens * width, name,
                  " must be contiguous float32 with ", width, " value(s) a token");
}

inline Statistics* statistics_of(Tensor& t) { return static_cast<Statistics*>(t.mutable_data_ptr()); }
inline const Statistics* statistics_of(const Tensor& t) { return static_cast<const Statistics*>(t.const_data_ptr()); }
inline const float* floats_of(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* floats_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace egrsd
