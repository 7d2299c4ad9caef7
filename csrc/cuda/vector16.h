// Sixteen bytes of logits at a time: how each element type is loaded, widened to fp32 and narrowed again.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common/logits.h"

namespace egrsd::cuda {

template <class T>
struct Vector16;

template <>
struct Vector16<float> {
  static constexpr int kWidth = 4;
  static __device__ float widen(float x) { return x; }
  static __device__ float narrow(float x) { return x; }
  static __device__ void unpack(const uint4& v, float* x) {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(w[i]);
  }
  static __device__ uint4 pack(const float* x) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
  }
};

template <>
struct Vector16<__nv_bfloat16> {
  static constexpr int kWidth = 8;
  static __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
  static __device__ void unpack(const uint4& v, float* x) {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(w[i] << 16);
      x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
  }
  static __device__ uint4 pack(const float* x) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      w[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
  }
};

template <>
struct Vector16<__half> {
  static constexpr int kWidth = 8;
  static __device__ float widen(__half x) { return __half2float(x); }
  static __device__ __half narrow(float x) { return __float2half_rn(x); }
  static __device__ void unpack(const uint4& v, float* x) {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&w[i]));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
  static __device__ uint4 pack(const float* x) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      w[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
  }
};

// Elements of a row before its first 16-byte boundary.
template <class T>
__device__ __forceinline__ int64_t elements_before_boundary(const T* p, int64_t limit) {
  const int64_t count = ((16 - (reinterpret_cast<uintptr_t>(p) & 15)) & 15) / sizeof(T);
  return count < limit ? count : limit;
}

// The elements [head, tail) of a row of `valid` are `vectors` of 16 bytes; none unless it is `vectorised`.
template <class T>
struct VectorSpan {
  int64_t head, tail;
  uint32_t vectors;  // rows are shorter than 2^31, checked on the host

  __device__ __forceinline__ VectorSpan(const T* p, int64_t valid, bool vectorised) {
    head = elements_before_boundary(p, valid);
    vectors = vectorised ? uint32_t((valid - head) / Vector16<T>::kWidth) : 0u;
    tail = head + int64_t(vectors) * Vector16<T>::kWidth;
  }
};

// launch(an element of the logits' type) for Logits or a Pair of which the kernels can count rows and columns.
template <class Tensors, class Launch>
int with_element(const Tensors& x, const Launch& launch) {
  if (x.rows == 0) return 0;
  if (x.columns >= int64_t(1) << 31 || x.rows >= int64_t(1) << 31) return int(cudaErrorInvalidValue);
  switch (x.dtype) {
    case Dtype::kFloat32: return launch(float());
    case Dtype::kBFloat16: return launch(__nv_bfloat16());
    case Dtype::kFloat16: return launch(__half());
  }
  return int(cudaErrorInvalidValue);
}

}  // namespace egrsd::cuda
