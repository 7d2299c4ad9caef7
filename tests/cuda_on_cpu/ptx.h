// csrc/cuda/ptx.h without the instructions. As on a GPU, an access of 16 bytes must be aligned to them.
#pragma once
#include "cuda_runtime.h"

namespace egrsd::cuda {

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) cuda_on_cpu::last_error = cudaErrorMisalignedAddress;
}
inline uint4 load_once(const void* p) {
  check_aligned(p);
  uint4 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline uint4 load_then_overwritten(const void* p) { return load_once(p); }
inline void store_streaming(void* p, const uint4& v) {
  check_aligned(p);
  std::memcpy(p, &v, 16);
}
inline float max_keep_nan(float a, float b) { return a != a ? a : b != b ? b : fmaxf(a, b); }
inline float exp2_approx(float x) { return x < -126.f ? 0.f : exp2f(x); }
inline float divide_approx(float a, float b) { return a / b; }

}  // namespace egrsd::cuda
