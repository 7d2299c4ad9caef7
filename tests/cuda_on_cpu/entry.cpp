// The kernels' entry points for ctypes; kernels.cpp is csrc/cuda/kernels.cu with its launches rewritten.
#include "kernels.cpp"

using namespace egrsd;

extern "C" {

int split_statistics(const Logits* logits) {
  return cuda::splits_for(logits->rows, logits->valid, cuda::multiprocessors(0));
}
int statistics(const Logits* logits, int splits, Statistics* workspace, Statistics* out) {
  return cuda::statistics(*logits, splits, workspace, out, nullptr);
}
int combine(const Statistics* parts, int64_t ranks, int64_t rows, Statistics* whole, float* log_prob, float* entropy,
            float* log_normalizer) {
  return cuda::combine(parts, ranks, rows, whole, log_prob, entropy, log_normalizer, nullptr);
}
int logits_grad(const Logits* logits, const Gradient* gradient) {
  return cuda::logits_grad(*logits, *gradient, nullptr);
}

}
