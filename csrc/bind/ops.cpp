// Schemas of the ops and their CPU side, on torch's stable ABI: one build serves every Python and torch from 2.11 on.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "checks.h"

namespace egrsd {
namespace {

cpu::Dtype dtype_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return cpu::Dtype::kFloat32;
  return t.scalar_type() == ScalarType::BFloat16 ? cpu::Dtype::kBFloat16 : cpu::Dtype::kFloat16;
}

cpu::Logits logits_of(const Tensor& logits, const Tensor& target, int64_t vocab_start, int64_t valid,
                      double inverse_temperature) {
  check_rows(logits, target, valid);
  return {logits.const_data_ptr(),
          dtype_of(logits),
          logits.stride(0),
          logits.size(1),
          valid,
          vocab_start,
          static_cast<const int64_t*>(target.const_data_ptr()),
          inverse_temperature};
}

Tensor statistics(const Tensor& logits, const Tensor& target, int64_t vocab_start, int64_t valid,
                  double inverse_temperature) {
  const cpu::Logits rows = logits_of(logits, target, vocab_start, valid, inverse_temperature);
  const int64_t tokens = logits.size(0), threads = torch::stable::get_num_threads();
  Tensor out = torch::stable::new_empty(logits, {tokens, 4}, ScalarType::Float);
  Statistics* result = statistics_of(out);
  // Each thread gets some of the rows; if there are too few rows, each gets parts of rows.
  constexpr int64_t kSmallestPart = 4096;
  const int64_t wanted = tokens >= 4 * threads || tokens == 0 ? 1 : (4 * threads + tokens - 1) / tokens;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, valid / kSmallestPart));
  if (parts == 1) {
    torch::stable::parallel_for(0, tokens, 1, [&](int64_t first, int64_t last) {
      cpu::statistics(rows, first, last, 0, valid, result + first);
    });
    return out;
  }
  const int64_t width = (valid + parts - 1) / parts;
  std::vector<Statistics> pieces(tokens * parts);
  torch::stable::parallel_for(0, tokens * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / parts, column = i % parts * width;
      cpu::statistics(rows, row, row + 1, column, std::min(column + width, valid), &pieces[i]);
    }
  });
  for (int64_t row = 0; row < tokens; ++row) {
    result[row] = pieces[row * parts];
    for (int64_t k = 1; k < parts; ++k) result[row] = merged(result[row], pieces[row * parts + k]);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> combine(const Tensor& parts) {
  STD_TORCH_CHECK(parts.dim() == 3 && parts.size(0) >= 1, "parts must be [R, N, 4] with R > 0");
  const int64_t ranks = parts.size(0), tokens = parts.size(1);
  check_per_token(parts, tokens, 4 * ranks, "parts");
  Tensor whole = torch::stable::new_empty(parts, {tokens, 4});
  Tensor log_prob = torch::stable::new_empty(parts, {tokens}), entropy = torch::stable::new_empty(parts, {tokens});
  const Statistics* part = statistics_of(parts);
  Statistics* result = statistics_of(whole);
  float *log_probs = floats_of(log_prob), *entropies = floats_of(entropy);
  for (int64_t i = 0; i < tokens; ++i) {
    Statistics s = part[i];
    for (int64_t r = 1; r < ranks; ++r) s = merged(s, part[r * tokens + i]);
    const Result values = finish(s);
    result[i] = s;
    log_probs[i] = float(values.log_prob);
    entropies[i] = float(values.entropy);
  }
  return {whole, log_prob, entropy};
}

void write_gradient(const Tensor& logits, Tensor& out, const Tensor& target, const Tensor& whole,
                    const Tensor& grad_log_prob, const std::optional<Tensor>& grad_entropy, int64_t vocab_start,
                    int64_t valid, double inverse_temperature) {
  const cpu::Logits rows = logits_of(logits, target, vocab_start, valid, inverse_temperature);
  const int64_t tokens = logits.size(0);
  check_per_token(whole, tokens, 4, "statistics");
  check_per_token(grad_log_prob, tokens, 1, "grad_log_prob");
  if (grad_entropy) check_per_token(*grad_entropy, tokens, 1, "grad_entropy");
  const cpu::Gradient gradient{out.mutable_data_ptr(), out.stride(0), statistics_of(whole), floats_of(grad_log_prob),
                               grad_entropy ? floats_of(*grad_entropy) : nullptr};
  torch::stable::parallel_for(0, tokens, 1,
                              [&](int64_t first, int64_t last) { cpu::logits_grad(rows, gradient, first, last); });
}

Tensor logits_grad(const Tensor& logits, const Tensor& target, const Tensor& whole, const Tensor& grad_log_prob,
                   const std::optional<Tensor>& grad_entropy, int64_t vocab_start, int64_t valid,
                   double inverse_temperature) {
  check_rows(logits, target, valid);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  write_gradient(logits, out, target, whole, grad_log_prob, grad_entropy, vocab_start, valid, inverse_temperature);
  return out;
}

void logits_grad_(Tensor logits, const Tensor& target, const Tensor& whole, const Tensor& grad_log_prob,
                  const std::optional<Tensor>& grad_entropy, int64_t vocab_start, int64_t valid,
                  double inverse_temperature) {
  write_gradient(logits, logits, target, whole, grad_log_prob, grad_entropy, vocab_start, valid, inverse_temperature);
}

// The memory floors of the benchmark, over the same threads as the kernels.
constexpr int64_t kPage = 4096;

double read_floor(const Tensor& memory) {
  const char* p = static_cast<const char*>(memory.const_data_ptr());
  torch::stable::parallel_for(0, memory.numel() * memory.element_size() / kPage, 1, [&](int64_t first, int64_t last) {
    volatile float sink = cpu::read_floor(p + first * kPage, (last - first) * kPage);
    (void)sink;
  });
  return 0.0;
}

void read_write_floor_(Tensor memory) {
  char* p = static_cast<char*>(memory.mutable_data_ptr());
  torch::stable::parallel_for(0, memory.numel() * memory.element_size() / kPage, 1, [&](int64_t first, int64_t last) {
    cpu::read_write_floor(p + first * kPage, (last - first) * kPage);
  });
}

std::string instruction_set() { return cpu::instruction_set(); }

}  // namespace
}  // namespace egrsd

STABLE_TORCH_LIBRARY(megatron_egrsd, m) {
  m.def("statistics(Tensor logits, Tensor target, int vocab_start, int valid, float inverse_temperature) -> Tensor");
  m.def("combine(Tensor parts) -> (Tensor, Tensor, Tensor)");
  m.def(
      "logits_grad(Tensor logits, Tensor target, Tensor statistics, Tensor grad_log_prob, Tensor? grad_entropy, "
      "int vocab_start, int valid, float inverse_temperature) -> Tensor");
  m.def(
      "logits_grad_(Tensor(a!) logits, Tensor target, Tensor statistics, Tensor grad_log_prob, Tensor? grad_entropy, "
      "int vocab_start, int valid, float inverse_temperature) -> ()");
  m.def("read_floor(Tensor memory) -> float");
  m.def("read_write_floor_(Tensor(a!) memory) -> ()");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_egrsd, CPU, m) {
  m.impl("statistics", TORCH_BOX(&egrsd::statistics));
  m.impl("combine", TORCH_BOX(&egrsd::combine));
  m.impl("logits_grad", TORCH_BOX(&egrsd::logits_grad));
  m.impl("logits_grad_", TORCH_BOX(&egrsd::logits_grad_));
  m.impl("read_floor", TORCH_BOX(&egrsd::read_floor));
  m.impl("read_write_floor_", TORCH_BOX(&egrsd::read_write_floor_));
}

STABLE_TORCH_LIBRARY_IMPL(megatron_egrsd, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&egrsd::instruction_set));
}
