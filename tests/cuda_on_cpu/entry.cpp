// The kernels' entry points for ctypes; kernels.cpp is csrc/cuda/kernels.cu with its launches rewritten.
#include "kernels.cpp"

using namespace egrsd;

extern "C" {

int split_statistics(const cuda::Logits* logits) {
  return cuda::splits_for(logits->rows, logits->valid, cuda::multiprocessors(0));
}
int statistics(const cuda::Logits* logits, int splits, Statistics* workspace, Statistics* out) {
  return cuda::statistics(*logits, splits, workspace, out, nullptr);
}
int combine(const Statistics* parts, int64_t ranks, int64_t rows, Statistics* whole, float* log_prob, float* entropy) {
  return cuda::combine(parts, ranks, rows, whole, log_prob, entropy, nullptr);
}
int logits_grad(const cuda::Logits* logits, const Statistics* whole, const float* grad_log_prob,
                const float* grad_entropy, void* grad, int64_t grad_stride) {
  return cuda::logits_grad(*logits, whole, grad_log_prob, grad_entropy, grad, grad_stride, nullptr);
}

}
