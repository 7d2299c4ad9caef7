// Any processor: four lanes in the compiler's vector extension (SSE2 on x86-64, NEON on aarch64).
#include "divergence_kernels.h"

namespace egrsd::cpu {
namespace {

struct Portable : Scalar {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr const char* kName = "portable";
  static constexpr int64_t kWidth = 4;
  static constexpr bool kExp2IsBounded = true;

  template <class T>
  static inline void load(const T* p, F& a, F& b) {
    a = F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
    b = F{to_float(p[4]), to_float(p[5]), to_float(p[6]), to_float(p[7])};
  }
  template <class T>
  static inline void store(T* p, F a, F b) {
    for (int i = 0; i < 4; ++i) {
      p[i] = from_float<T>(a[i]);
      p[i + 4] = from_float<T>(b[i]);
    }
  }

  static inline F set(float x) { return F{x, x, x, x}; }
  static inline F add(F a, F b) { return a + b; }
  static inline F mul(F a, F b) { return a * b; }
  static inline F fma(F a, F b, F c) {  // one rounding of x bits - reference is what keeps offset logits accurate
    F r = c;
    for (int i = 0; i < 4; ++i)
#if defined(__FP_FAST_FMAF)
      r[i] = __builtin_fmaf(a[i], b[i], c[i]);
#else
      r[i] = float(double(a[i]) * double(b[i]) + double(c[i]));
#endif
    return r;
  }
  static inline F max(F a, F b) { return a > b ? a : b; }
  static inline F min(F a, F b) { return a < b ? a : b; }

  // As in simd_avx2.cpp.
  static inline F exp2_of_number(F y) {
    const F magic = set(12582912.f), shifted = y + magic, f = y - (shifted - magic);
    F p = set(0.0013264727f) * f + set(0.009671513f);
    p = p * f + set(0.055507336f);
    p = p * f + set(0.24022242f);
    p = p * f + set(0.693147f);
    p = p * f + set(1.f);
    return (F)((I)p + ((I)shifted << 23));
  }
  static inline F exp2(F y) { return y == y ? exp2_of_number(y) : y; }

  static inline F sub(F a, F b) { return a - b; }
  static inline F div(F a, F b) { return a / b; }
  static inline F select_above(F a, F b, F x, F y) { return a > b ? x : y; }
  static inline F exp2_integer(F n) { return (F)((I)(n + set(12583039.f)) << 23); }
  static inline F normalised(F x, F& n) {
    const I u = (I)x, exponent = (u - 0x3f2aaaab) >> 23;
    n = __builtin_convertvector(exponent, F);
    return (F)(u - (exponent << 23));
  }

  static inline bool any(I mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
  static inline bool any_above(F x, float limit) { return any(~(I)(x <= set(limit))); }
  static inline bool any_nan(F x) { return any((I)(x != x)); }
  static inline double sum(F x) { return double(x[0]) + double(x[1]) + double(x[2]) + double(x[3]); }
  static inline float peak(F x) {
    float best = x[0];
    for (int i = 1; i < 4; ++i) best = x[i] > best ? x[i] : best;
    return best;
  }
  static inline void prefetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
  }
};

}  // namespace

const RowKernels* portable_kernels() {
  static constexpr RowKernels kernels = entry_points<Portable>();
  return &kernels;
}
}  // namespace egrsd::cpu
