// One float of a CUDA thread, as ../common/pair_columns.h asks of lanes.
#pragma once
#include <cstdint>

#include "ptx.h"

namespace egrsd::cuda {

struct Lane {
  using F = float;
  static constexpr bool kExp2IsBounded = false;

  static __device__ __forceinline__ F set(float x) { return x; }
  static __device__ __forceinline__ F add(F a, F b) { return a + b; }
  static __device__ __forceinline__ F sub(F a, F b) { return a - b; }
  static __device__ __forceinline__ F mul(F a, F b) { return a * b; }
  static __device__ __forceinline__ F div(F a, F b) { return divide_approx(a, b); }
  static __device__ __forceinline__ F fma(F a, F b, F c) { return fmaf(a, b, c); }
  static __device__ __forceinline__ F max(F a, F b) { return max_keep_nan(a, b); }
  static __device__ __forceinline__ F min(F a, F b) { return fminf(a, b); }
  static __device__ __forceinline__ F select_above(F a, F b, F x, F y) { return a > b ? x : y; }
  static __device__ __forceinline__ F exp2(F y) { return exp2_approx(y); }
  // n + 127 in the low bits of n + 1.5 * 2^23 + 127
  static __device__ __forceinline__ F exp2_integer(F n) {
    return __uint_as_float(__float_as_uint(n + 12583039.f) << 23);
  }
  static __device__ __forceinline__ F normalised(F x, F& n) {
    const int32_t bits = int32_t(__float_as_uint(x)), exponent = (bits - 0x3f2aaaab) >> 23;
    n = float(exponent);
    return __uint_as_float(uint32_t(bits) - (uint32_t(exponent) << 23));
  }
};

}  // namespace egrsd::cuda
