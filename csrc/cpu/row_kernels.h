// The two row kernels, written once over a SIMD type S (simd_*.cpp) and an element type T.
//
// S provides: F (a vector of kWidth floats), load (2 kWidth elements as two F, in an order store() undoes), store,
// set, add, mul, fma (a b + c), max and min (that keep a NaN of their second operand), exp2, any_above (true for NaN),
// any_nan, sum, peak, prefetch. kExp2IsBounded: exp2 takes only [-126, 127] and NaN.
#pragma once
#include "scalar.h"

namespace egrsd::cpu {

template <class S>
struct Rows {
  using F = typename S::F;
  static constexpr int64_t kPair = 2 * S::kWidth;   // elements of one load
  static constexpr int64_t kStep = 2 * kPair;       // elements of one turn of the inner loops
  static constexpr int64_t kBlock = 2048;           // elements between two looks at the reference; fits in L1
  // A block is summed against the reference of the blocks before it. If a lane's sum shows that a logit rose far above
  // it (or NaN, or inf), the block is done again against its own maximum: a few times a row, instead of a pass for the
  // maximum over all of it. An unnoticed rise is below log2(kRise) = 9 bits, which costs the entropy less than 1e-6.
  static constexpr float kRise = 4.f * kBlock / S::kWidth;
  static constexpr float kLowest = -126.f;  // bits; below it 2^y counts as 0

  struct Sums {
    F total, weighted;  // lanes of sum e and sum e y, in bits
  };

  struct Partial {
    float reference;
    Sums sums;
    bool invalid;  // a NaN or +inf was seen
  };

  // The last, incomplete pair of a range: padded with -inf, so that it takes part in nothing.
  template <class T>
  static void load_tail(const T* p, int64_t n, F& a, F& b) {
    T padded[kPair];
    for (int64_t i = 0; i < kPair; ++i) padded[i] = S::template lowest<T>();
    std::memcpy(padded, p, n * sizeof(T));
    S::load(padded, a, b);
  }

  template <class T>
  static float row_peak(const T* p, int64_t n) {
    F a, b, m = S::set(-INFINITY), k = m;
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) {
      S::load(p + i, a, b);
      m = S::max(m, a);
      k = S::max(k, b);
    }
    if (i < n) {
      load_tail(p + i, n - i, a, b);
      m = S::max(m, a);
      k = S::max(k, b);
    }
    return S::peak(S::max(m, k));
  }

  template <class T>
  static bool has_nan(const T* p, int64_t n) {
    F a, b;
    bool nan = false;
    for (int64_t i = 0; i < n; i += kPair) {
      n - i < kPair ? load_tail(p + i, n - i, a, b) : S::load(p + i, a, b);
      nan |= S::any_nan(a) | S::any_nan(b);
    }
    return nan;
  }

  // Clamp y to the range of exp2 and, if kFinite, so that y 2^y is finite.
  template <bool kFinite>
  static inline F bounded(F y) {
    if (kFinite || S::kExp2IsBounded) y = S::max(S::set(kLowest), y);
    return S::kExp2IsBounded ? S::min(S::set(127.f), y) : y;
  }

  // kMasked: the block may hold -inf, whose e y would be 0 * inf.
  template <bool kMasked>
  static inline void accumulate(F x, F bits, F minus_reference, F& total, F& weighted) {
    const F y = bounded<kMasked>(S::fma(x, bits, minus_reference));
    const F e = S::exp2(y);
    total = S::add(total, e);
    weighted = S::fma(y, e, weighted);
  }

  template <bool kMasked, class T>
  static inline Sums block_sums(const T* p, int64_t n, float bits_per_logit, float reference) {
    const F bits = S::set(bits_per_logit), minus = S::set(-reference), zero = S::set(0.f);
    F t0 = zero, t1 = zero, t2 = zero, t3 = zero, w0 = zero, w1 = zero, w2 = zero, w3 = zero;
    F a, b, c, d;
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      S::prefetch(p + i + kBlock, kStep * sizeof(T));
      S::load(p + i, a, b);
      S::load(p + i + kPair, c, d);
      accumulate<kMasked>(a, bits, minus, t0, w0);
      accumulate<kMasked>(b, bits, minus, t1, w1);
      accumulate<kMasked>(c, bits, minus, t2, w2);
      accumulate<kMasked>(d, bits, minus, t3, w3);
    }
    for (; i < n; i += kPair) {
      n - i < kPair ? load_tail(p + i, n - i, a, b) : S::load(p + i, a, b);
      accumulate<true>(a, bits, minus, t0, w0);
      accumulate<true>(b, bits, minus, t1, w1);
    }
    return {S::add(S::add(t0, t1), S::add(t2, t3)), S::add(S::add(w0, w1), S::add(w2, w3))};
  }

  // Take the exact maximum of a block as the reference, if that is higher. False if the block adds nothing.
  template <class T>
  static bool raise_reference(const T* p, int64_t n, float bits_per_logit, Partial& part) {
    const float peak = row_peak(p, n) * bits_per_logit;
    if (!std::isfinite(peak)) {
      part.invalid |= peak != -INFINITY || has_nan(p, n);
      return false;
    }
    const float reference = std::ceil(peak);
    if (reference > part.reference) {
      if (part.reference != -INFINITY) {
        const float shift = part.reference - reference;
        const F scale = S::set(std::exp2(shift));
        part.sums.weighted = S::mul(scale, S::fma(S::set(shift), part.sums.total, part.sums.weighted));
        part.sums.total = S::mul(scale, part.sums.total);
      }
      part.reference = reference;
    }
    return true;
  }

  template <class T>
  static void add_block(const T* p, int64_t n, float bits_per_logit, Partial& part) {
    if (part.reference == -INFINITY && !raise_reference(p, n, bits_per_logit, part)) return;
    Sums sums = block_sums<false>(p, n, bits_per_logit, part.reference);
    if (__builtin_expect(S::any_above(sums.total, kRise) || S::any_nan(sums.weighted), false)) {
      if (!raise_reference(p, n, bits_per_logit, part)) return;
      sums = block_sums<true>(p, n, bits_per_logit, part.reference);
      part.invalid |= S::any_nan(sums.weighted);
    }
    part.sums = {S::add(part.sums.total, sums.total), S::add(part.sums.weighted, sums.weighted)};
  }

  template <class T>
  static void add_range(const T* p, int64_t first, int64_t last, float bits_per_logit, Partial& part) {
    for (int64_t i = first; i < last && !part.invalid; i += kBlock)
      add_block(p + i, last - i < kBlock ? last - i : kBlock, bits_per_logit, part);
  }

  template <class T>
  static Statistics row_statistics(const T* p, int64_t first, int64_t last, int64_t target, float bits_per_logit) {
    const bool held = target >= first && target < last;
    Partial part{-INFINITY, {S::set(0.f), S::set(0.f)}, false};
    add_range(p, first, held ? target : last, bits_per_logit, part);
    if (held) add_range(p, target + 1, last, bits_per_logit, part);
    Statistics out = empty_statistics();
    const float at_target = held ? S::to_float(p[target]) : -INFINITY;
    if (part.invalid || std::isnan(at_target) || at_target == INFINITY) {
      out.reference = 0.f;
      out.rest = out.weighted = NAN;
      return out;
    }
    if (part.reference != -INFINITY)
      out = {part.reference, float(S::sum(part.sums.total)), float(kLn2 * S::sum(part.sums.weighted)), -INFINITY};
    if (at_target == -INFINITY) return out;
    // The target's term and, if it is the largest by far, its reference: 2^(y - c) has to stay finite.
    const float y = std::fma(at_target, bits_per_logit, -out.reference);
    if (y > 1.f) out = moved(out, std::ceil(at_target * bits_per_logit));
    out.target = float(kLn2 * std::fma(double(at_target), double(bits_per_logit), -double(out.reference)));
    return out;
  }

  template <class T>
  static void statistics_of(const Logits& l, int64_t row_first, int64_t row_last, int64_t first, int64_t last,
                            Statistics* out) {
    if (last > l.valid) last = l.valid;
    for (int64_t r = row_first; r < row_last; ++r) {
      const int64_t target = l.target_of(r);
      out[r - row_first] = target == kIgnoreIndex
                               ? ignored_statistics()
                               : row_statistics(static_cast<const T*>(l.data) + l.layout.offset(r), first, last,
                                                target - l.vocab_start, float(kLog2e * l.inverse_temperature_of(r)));
    }
  }

  template <bool kEntropy>
  static inline F gradient(F x, F bits, F minus_reference, F constant, F slope) {
    const F y = bounded<kEntropy>(S::fma(x, bits, minus_reference));
    return S::mul(S::exp2(y), kEntropy ? S::fma(slope, y, constant) : constant);
  }

  template <bool kEntropy, class T>
  static void row_gradient(const T* p, T* out, int64_t n, float bits_per_logit, float reference,
                           const GradientCoefficients& k) {
    const F bits = S::set(bits_per_logit), minus = S::set(-reference);
    const F constant = S::set(k.constant), slope = S::set(k.slope);
    F a, b, c, d;
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      S::load(p + i, a, b);
      S::load(p + i + kPair, c, d);
      a = gradient<kEntropy>(a, bits, minus, constant, slope);
      b = gradient<kEntropy>(b, bits, minus, constant, slope);
      c = gradient<kEntropy>(c, bits, minus, constant, slope);
      d = gradient<kEntropy>(d, bits, minus, constant, slope);
      S::store(out + i, a, b);
      S::store(out + i + kPair, c, d);
    }
    for (; i < n; i += kPair) {
      const int64_t count = n - i < kPair ? n - i : kPair;
      T last[kPair];
      load_tail(p + i, count, a, b);
      S::store(last, gradient<true>(a, bits, minus, constant, slope), gradient<true>(b, bits, minus, constant, slope));
      std::memcpy(out + i, last, count * sizeof(T));
    }
  }

  template <class T>
  static void gradient_of(const Logits& l, const Gradient& g, int64_t row_first, int64_t row_last) {
    for (int64_t r = row_first; r < row_last; ++r) {
      const T* p = static_cast<const T*>(l.data) + l.layout.offset(r);
      T* out = static_cast<T*>(g.data) + g.layout.offset(r);
      const int64_t target_id = l.target_of(r);
      const int64_t written = target_id == kIgnoreIndex ? 0 : l.valid;
      if (written > 0) {
        const double inverse_temperature = l.inverse_temperature_of(r);
        const float bits_per_logit = float(kLog2e * inverse_temperature);
        const GradientCoefficients k = g.coefficients(r, inverse_temperature);
        if (g.grad_entropy)
          row_gradient<true>(p, out, written, bits_per_logit, g.whole[r].reference, k);
        else
          row_gradient<false>(p, out, written, bits_per_logit, g.whole[r].reference, k);
        const int64_t target = target_id - l.vocab_start;
        if (target >= 0 && target < written) out[target] = S::template from_float<T>(k.at_target);
      }
      std::memset(static_cast<void*>(out + written), 0, (l.columns - written) * sizeof(T));
    }
  }

  static constexpr RowKernels entry_points() { return {S::kName, &statistics, &logits_grad, {}}; }

  static void statistics(const Logits& l, int64_t r0, int64_t r1, int64_t c0, int64_t c1, Statistics* out) {
    switch (l.dtype) {
      case Dtype::kFloat32: return statistics_of<Float32>(l, r0, r1, c0, c1, out);
      case Dtype::kBFloat16: return statistics_of<BFloat16>(l, r0, r1, c0, c1, out);
      case Dtype::kFloat16: return statistics_of<Float16>(l, r0, r1, c0, c1, out);
    }
  }

  static void logits_grad(const Logits& l, const Gradient& g, int64_t r0, int64_t r1) {
    switch (l.dtype) {
      case Dtype::kFloat32: return gradient_of<Float32>(l, g, r0, r1);
      case Dtype::kBFloat16: return gradient_of<BFloat16>(l, g, r0, r1);
      case Dtype::kFloat16: return gradient_of<Float16>(l, g, r0, r1);
    }
  }
};

}  // namespace egrsd::cpu
