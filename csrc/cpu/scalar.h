// Shared by the instruction sets: element types, conversions of single elements, entry points.
//
// simd_*.cpp include this file before they switch the compiler to their instruction set, and row_kernels.h after: an
// inline function compiled for AVX-512 must not be the copy that the linker keeps for all of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "divergence.h"
#include "kernels.h"

namespace egrsd::cpu {

struct Float32 { float value; };
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// Entry points of one instruction set for two tensors (divergence_kernels.h).
struct PairKernels {
  void (*statistics)(const Pair&, bool, int64_t, int64_t, int64_t, int64_t, PairStatistics*);
  void (*entry_sums)(const Pair&, const Entries&, int64_t, int64_t, int64_t, int64_t, EntrySums*);
  void (*gradient)(const Pair&, const Entries&, const PairGradient&, int64_t, int64_t);
};

// Entry points of one instruction set; null if the compiler cannot generate them.
struct RowKernels {
  const char* name;
  void (*statistics)(const Logits&, int64_t, int64_t, int64_t, int64_t, Statistics*);
  void (*logits_grad)(const Logits&, const Gradient&, int64_t, int64_t);
  PairKernels pair;
};
const RowKernels* avx512_bf16_kernels();  // AVX-512 F, BW, DQ, VL and BF16
const RowKernels* avx512_kernels();       // AVX-512 F, BW, DQ, VL
const RowKernels* avx2_kernels();         // AVX2, FMA, F16C
const RowKernels* portable_kernels();

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

struct Scalar {
  static float to_float(Float32 x) { return x.value; }
  static float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
  static float to_float(Float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
    // exponent bias 127 - 15 by a multiplication, which also normalises subnormals
    const float value = bits_to_float(magnitude << 13) * 0x1p112f;
    return bits_to_float(sign | float_to_bits(value));
  }

  template <class T>
  static T from_float(float f);

  template <class T>
  static T lowest();  // -inf
};

template <>
inline Float32 Scalar::from_float<Float32>(float f) { return {f}; }
template <>
inline BFloat16 Scalar::from_float<BFloat16>(float f) {  // to nearest, ties to even
  if (f != f) return {0x7fc0};
  const uint32_t u = float_to_bits(f);
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline Float16 Scalar::from_float<Float16>(float f) {  // to nearest, ties to even
  const uint32_t u = float_to_bits(f), magnitude = u & 0x7fffffff;
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds beyond 65504
  if (magnitude < 0x38800000) {  // below 2^-14: the sum's last bit is the subnormal's
    const float aligned = bits_to_float(magnitude) + 0.5f;
    return {uint16_t(sign | (float_to_bits(aligned) - 0x3f000000))};
  }
  return {uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}
template <>
inline Float32 Scalar::lowest<Float32>() { return {-INFINITY}; }
template <>
inline BFloat16 Scalar::lowest<BFloat16>() { return {0xff80}; }
template <>
inline Float16 Scalar::lowest<Float16>() { return {0xfc00}; }

}  // namespace egrsd::cpu
