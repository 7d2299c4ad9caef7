// The CUDA side of the ops. Host code: compiled by the C++ compiler, without CUDA's headers.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../cuda/kernels.h"
#include "checks.h"

#ifndef USE_CUDA
// Declared by the shim only in CUDA builds of torch; weak, so that this file also links (and is tested) against a CPU one.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace egrsd {
namespace {

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void check(int error) { STD_TORCH_CHECK(error == 0, "CUDA kernel failed: ", cuda::error_name(error)); }

cuda::Logits logits_of(const Tensor& logits, const Tensor& target, int64_t vocab_start, int64_t valid,
                       double inverse_temperature) {
  check_rows(logits, target, valid);
  const ScalarType t = logits.scalar_type();
  const cuda::Dtype dtype = t == ScalarType::Float      ? cuda::Dtype::kFloat32
                            : t == ScalarType::BFloat16 ? cuda::Dtype::kBFloat16
                                                        : cuda::Dtype::kFloat16;
  return {logits.const_data_ptr(),
          dtype,
          logits.stride(0),
          logits.size(0),
          logits.size(1),
          valid,
          vocab_start,
          static_cast<const int64_t*>(target.const_data_ptr()),
          inverse_temperature};
}

Tensor statistics(const Tensor& logits, const Tensor& target, int64_t vocab_start, int64_t valid,
                  double inverse_temperature) {
  const cuda::Logits rows = logits_of(logits, target, vocab_start, valid, inverse_temperature);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const int splits = cuda::splits_for(rows.rows, valid, cuda::multiprocessors(logits.get_device_index()));
  Tensor out = torch::stable::new_empty(logits, {rows.rows, 4}, ScalarType::Float);
  Tensor workspace = torch::stable::new_empty(logits, {splits > 1 ? rows.rows * splits : 0, 4}, ScalarType::Float);
  check(cuda::statistics(rows, splits, statistics_of(workspace), statistics_of(out), current_stream(logits)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> combine(const Tensor& parts) {
  STD_TORCH_CHECK(parts.dim() == 3 && parts.size(0) >= 1, "parts must be [R, N, 4] with R > 0");
  const int64_t ranks = parts.size(0), tokens = parts.size(1);
  check_per_token(parts, tokens, 4 * ranks, "parts");
  const torch::stable::accelerator::DeviceGuard guard(parts.get_device_index());
  Tensor whole = torch::stable::new_empty(parts, {tokens, 4});
  Tensor log_prob = torch::stable::new_empty(parts, {tokens}), entropy = torch::stable::new_empty(parts, {tokens});
  check(cuda::combine(statistics_of(parts), ranks, tokens, statistics_of(whole), floats_of(log_prob),
                      floats_of(entropy), current_stream(parts)));
  return {whole, log_prob, entropy};
}

void write_gradient(const Tensor& logits, Tensor& out, const Tensor& target, const Tensor& whole,
                    const Tensor& grad_log_prob, const std::optional<Tensor>& grad_entropy, int64_t vocab_start,
                    int64_t valid, double inverse_temperature) {
  const cuda::Logits rows = logits_of(logits, target, vocab_start, valid, inverse_temperature);
  check_per_token(whole, rows.rows, 4, "statistics");
  check_per_token(grad_log_prob, rows.rows, 1, "grad_log_prob");
  if (grad_entropy) check_per_token(*grad_entropy, rows.rows, 1, "grad_entropy");
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check(cuda::logits_grad(rows, statistics_of(whole), floats_of(grad_log_prob),
                          grad_entropy ? floats_of(*grad_entropy) : nullptr, out.mutable_data_ptr(), out.stride(0),
                          current_stream(logits)));
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

}  // namespace
}  // namespace egrsd

// Its presence tells Python that this build serves CUDA tensors.
STABLE_TORCH_LIBRARY_FRAGMENT(megatron_egrsd, m) { m.def("cuda_kernels() -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(megatron_egrsd, CUDA, m) {
  m.impl("statistics", TORCH_BOX(&egrsd::statistics));
  m.impl("combine", TORCH_BOX(&egrsd::combine));
  m.impl("logits_grad", TORCH_BOX(&egrsd::logits_grad));
  m.impl("logits_grad_", TORCH_BOX(&egrsd::logits_grad_));
}
