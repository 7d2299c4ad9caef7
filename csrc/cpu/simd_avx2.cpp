// AVX2 with FMA and F16C: 8 lanes, the exponential a degree-5 polynomial.
#include "scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "divergence_kernels.h"

namespace egrsd::cpu {
namespace {

#define INLINE static inline __attribute__((always_inline))

struct Avx2 : Scalar {
  using F = __m256;
  static constexpr const char* kName = "avx2";
  static constexpr int64_t kWidth = 8;
  static constexpr bool kExp2IsBounded = true;

  INLINE void load(const Float32* p, F& a, F& b) {
    a = _mm256_loadu_ps(&p->value);
    b = _mm256_loadu_ps(&p[8].value);
  }
  INLINE void load(const BFloat16* p, F& a, F& b) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000))));
  }
  INLINE void load(const Float16* p, F& a, F& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  }
  INLINE void store(Float32* p, F a, F b) {
    _mm256_storeu_ps(&p->value, a);
    _mm256_storeu_ps(&p[8].value, b);
  }
  INLINE void store(BFloat16* p, F a, F b) {
    const __m256i odd = _mm256_slli_epi32(rounded(b), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(odd, rounded(a), 0x55));
  }
  INLINE void store(Float16* p, F a, F b) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, nearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b, nearest));
  }
  // bf16 in the lower half of each 32-bit lane, to nearest even
  INLINE __m256i rounded(F x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff))), 16);
  }

  INLINE F set(float x) { return _mm256_set1_ps(x); }
  INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }

  // Relative error below 2e-7: y = n + f with f in [-1/2, 1/2], n in the low bits of y + 1.5 * 2^23.
  INLINE F exp2_of_number(F y) {
    const F shifted = _mm256_add_ps(y, set(12582912.f));
    const F f = _mm256_sub_ps(y, _mm256_sub_ps(shifted, set(12582912.f)));
    F p = fma(set(0.0013264727f), f, set(0.009671513f));
    p = fma(p, f, set(0.055507336f));
    p = fma(p, f, set(0.24022242f));
    p = fma(p, f, set(0.693147f));
    p = fma(p, f, set(1.f));
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), n));
  }
  // a NaN passes through f and p; adding to its exponent must not make a number of it
  INLINE F exp2(F y) { return _mm256_blendv_ps(exp2_of_number(y), y, _mm256_cmp_ps(y, y, _CMP_UNORD_Q)); }

  INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  INLINE F select_above(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  // n + 127 in the low bits of n + 1.5 * 2^23 + 127
  INLINE F exp2_integer(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(_mm256_add_ps(n, set(12583039.f))), 23));
  }
  INLINE F normalised(F x, F& n) {
    const __m256i u = _mm256_castps_si256(x), above = _mm256_sub_epi32(u, _mm256_set1_epi32(0x3f2aaaab));
    const __m256i exponent = _mm256_srai_epi32(above, 23);
    n = _mm256_cvtepi32_ps(exponent);
    return _mm256_castsi256_ps(_mm256_sub_epi32(u, _mm256_slli_epi32(exponent, 23)));
  }

  INLINE bool any_above(F x, float limit) { return _mm256_movemask_ps(_mm256_cmp_ps(x, set(limit), _CMP_NLE_UQ)) != 0; }
  INLINE bool any_nan(F x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
  INLINE double sum(F x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, x);
    double total = 0;
    for (float lane : lanes) total += lane;
    return total;
  }
  INLINE float peak(F x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, x);
    float best = lanes[0];
    for (float lane : lanes) best = lane > best ? lane : best;
    return best;
  }
  INLINE void prefetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T0);
  }
};

}  // namespace

const RowKernels* avx2_kernels() {
  static constexpr RowKernels kernels = entry_points<Avx2>();
  return &kernels;
}
}  // namespace egrsd::cpu
#pragma GCC pop_options

#else
namespace egrsd::cpu {
const RowKernels* avx2_kernels() { return nullptr; }
}  // namespace egrsd::cpu
#endif
