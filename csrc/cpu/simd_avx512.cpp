// AVX-512: 16 lanes. The exponential is a 16-entry table in one register and a quadratic, which moves work from the two
// FMA pipes (which limit a degree-5 polynomial) to the add and shuffle pipes.
#include "scalar.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own _mm512_undefined_pd
#include <immintrin.h>
#pragma GCC diagnostic pop
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include "divergence_kernels.h"

namespace egrsd::cpu {
namespace {

#define INLINE static inline __attribute__((always_inline))

// 2^(i/16), i = 0 .. 15
alignas(64) constexpr float kSixteenths[16] = {
    1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
    1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};

alignas(64) constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// kNativeBFloat16 only chooses the instruction that rounds to bf16; nothing else here needs AVX512-BF16.
template <bool kNativeBFloat16>
struct Avx512 : Scalar {
  using F = __m512;
  static constexpr const char* kName = kNativeBFloat16 ? "avx512_bf16" : "avx512";
  static constexpr int64_t kWidth = 16;
  static constexpr bool kExp2IsBounded = false;

  INLINE void load(const Float32* p, F& a, F& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 16);
  }
  // a bf16 is the upper half of a float: even elements are shifted up, odd ones only masked
  INLINE void load(const BFloat16* p, F& a, F& b) {
    const __m512i v = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))));
  }
  INLINE void load(const Float16* p, F& a, F& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }
  INLINE void store(Float32* p, F a, F b) {
    _mm512_storeu_ps(p, a);
    _mm512_storeu_ps(p + 16, b);
  }
  INLINE void store(BFloat16* p, F a, F b) {
    if constexpr (kNativeBFloat16) {
      const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b, a);  // all of a, then all of b: to be interleaved again
      _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves));
    } else {
      const __m512i odd = _mm512_slli_epi32(rounded(b), 16);
      _mm512_storeu_si512(p, _mm512_mask_mov_epi16(odd, 0x55555555, rounded(a)));
    }
  }
  INLINE void store(Float16* p, F a, F b) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, nearest));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b, nearest));
  }
  // bf16 in the lower half of each 32-bit lane, to nearest even
  INLINE __m512i rounded(F x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
  }

  INLINE F set(float x) { return _mm512_set1_ps(x); }
  INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }

  // Relative error below 6e-7. y = n + i/16 + f with f in [0, 1/16): the integer in the low bits of y + 2^(23-4) 1.5,
  // rounded down, indexes the table (vpermps looks at four bits only), vreduce gives f, vscalef multiplies by 2^n.
  INLINE F exp2(F y) {
    constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const F index = _mm512_add_round_ps(y, _mm512_set1_ps(786432.f), down);
    const F f = _mm512_reduce_ps(y, (4 << 4) | down);
    const F root = _mm512_permutexvar_ps(_mm512_castps_si512(index), _mm512_load_ps(kSixteenths));
    const F slope = _mm512_fmadd_ps(_mm512_set1_ps(0.24510145f), f, _mm512_set1_ps(0.69305301f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(_mm512_mul_ps(root, f), slope, root), y);
  }

  INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  INLINE F select_above(F a, F b, F x, F y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x); }
  INLINE F exp2_integer(F n) { return _mm512_scalef_ps(set(1.f), n); }
  INLINE F normalised(F x, F& n) {
    const __m512i u = _mm512_castps_si512(x), above = _mm512_sub_epi32(u, _mm512_set1_epi32(0x3f2aaaab));
    const __m512i exponent = _mm512_srai_epi32(above, 23);
    n = _mm512_cvtepi32_ps(exponent);
    return _mm512_castsi512_ps(_mm512_sub_epi32(u, _mm512_slli_epi32(exponent, 23)));
  }

  INLINE F exp2_of_number(F y) { return exp2(y); }

  INLINE bool any_above(F x, float limit) { return _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLE_UQ) != 0; }
  INLINE bool any_nan(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
  INLINE double sum(F x) {
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
                                              _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))));
  }
  INLINE float peak(F x) { return _mm512_reduce_max_ps(x); }
  INLINE void prefetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T0);
  }
};

}  // namespace

const RowKernels* avx512_bf16_kernels() {
  static constexpr RowKernels kernels = entry_points<Avx512<true>>();
  return &kernels;
}
const RowKernels* avx512_kernels() {
  static constexpr RowKernels kernels = entry_points<Avx512<false>>();
  return &kernels;
}
}  // namespace egrsd::cpu
#pragma GCC pop_options

#else
namespace egrsd::cpu {
const RowKernels* avx512_bf16_kernels() { return nullptr; }
const RowKernels* avx512_kernels() { return nullptr; }
}  // namespace egrsd::cpu
#endif
