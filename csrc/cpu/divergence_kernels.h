// The kernels of ../common/divergence.h, written once over a SIMD type S (simd_*.cpp) and an element type T.
#pragma once
#include "../common/pair_terms.h"
#include "row_kernels.h"

namespace egrsd::cpu {

template <class S>
struct Divergence : PairTerms<S> {
  using Base = PairTerms<S>;
  using F = typename S::F;
  using R = Rows<S>;
  using Power = typename Base::Power;
  using Sums = typename Base::Sums;
  using Frame = typename Base::Frame;
  using Normalised = typename Base::Normalised;
  using EntryTotals = typename Base::EntryTotals;
  using Base::accumulate, Base::negated, Base::no_sums, Base::power;
  static constexpr int64_t kPair = R::kPair, kBlock = R::kBlock;
  static constexpr float kRise = R::kRise;
  static constexpr float kFar = 64.f;  // bits; where q / p is larger, p may underflow while q is of weight

  struct Row {
    double inverse_temperature;
    float bits_per_logit = float(kLog2e * inverse_temperature);
    PairSums sums = empty_pair();
    Frame next{-INFINITY, -INFINITY};  // of the next block, if both distributions have had mass
  };

  // y = log2 e and v = log2(f / e) of a column. Elements of 16 bits have an exact difference in fp32, so that y and v
  // are rounded once; fp32 logits are exact less a reference near them, whatever the offset of the two models.
  template <bool kExactDifference>
  struct NearTerms {
    Frame frame;
    float bits_per_logit;
    float first = kExactDifference ? -frame.reference * bits_per_logit : frame.reference;
    float second =
        kExactDifference ? (frame.reference - frame.other_reference) * bits_per_logit : frame.other_reference;
    F bits = S::set(bits_per_logit), a = S::set(first), b = S::set(second);

    inline void operator()(F t, F s, F& y, F& v) const {
      const F x = S::sub(t, a);
      y = kExactDifference ? S::fma(t, bits, a) : S::mul(x, bits);
      v = kExactDifference ? S::fma(S::sub(s, t), bits, b) : S::mul(S::sub(S::sub(s, b), x), bits);
    }

    // `sums` as they are seen from the frame: `first` and `second` were rounded.
    PairSums in_frame(PairSums sums, double inverse_temperature) const {
      if (!kExactDifference) return sums;
      sums.reference = -double(first) / bits_per_logit;
      sums.other_reference = sums.reference - double(second) / bits_per_logit;
      return moved(sums, frame.reference, frame.other_reference, inverse_temperature);
    }
  };

  // `accumulate` where 2^-126 <= q / p <= 2^kFar, from one exponential; `top` and `bottom` tell whether that was so.
  template <bool kOtherEntropy>
  static inline void accumulate_near(F y, F v, Sums& sums, F& top, F& bottom) {
    y = R::template bounded<false>(y);
    const F e = S::exp2_of_number(y);  // v shows a NaN
    top = S::max(top, v);
    if (S::kExp2IsBounded) bottom = S::min(bottom, v);  // otherwise 2^v is 0 there, as it should be
    const Power ratio = power(v);
    sums.total = S::add(sums.total, e);
    sums.entropy = S::fma(e, y, sums.entropy);
    sums.weighted = S::fma(e, v, sums.weighted);  // negative yet, and infinite or NaN if v is
    sums.excess = S::fma(e, ratio.excess, sums.excess);
    if (kOtherEntropy) {
      const F f = S::mul(e, ratio.ratio());
      sums.other_total = S::add(sums.other_total, f);
      sums.other_entropy = S::fma(f, S::add(y, v), sums.other_entropy);
    }
  }

  template <class T>
  static PairSums general_sums(const T* t, const T* s, int64_t n, float bits_per_logit, const Frame& frame) {
    const F bits = S::set(bits_per_logit);
    Sums sums = no_sums();
    F a, b, c, d;
    for (int64_t i = 0; i < n; i += kPair) {
      const bool tail = n - i < kPair;
      tail ? R::load_tail(t + i, n - i, a, b) : S::load(t + i, a, b);
      tail ? R::load_tail(s + i, n - i, c, d) : S::load(s + i, c, d);
      accumulate(a, c, bits, frame, sums);
      accumulate(b, d, bits, frame, sums);
    }
    return in_nats(sums, frame);
  }

  static PairSums in_nats(const Sums& sums, const Frame& frame) {
    return {frame.reference,
            frame.other_reference,
            S::sum(sums.total),
            S::sum(sums.other_total),
            kLn2 * S::sum(sums.weighted),
            S::sum(sums.excess),
            kLn2 * S::sum(sums.entropy),
            kLn2 * S::sum(sums.other_entropy)};
  }

  // False if the block is not of the kind that accumulate_near can sum. `before`: B of the row so far, in this frame.
  template <bool kOtherEntropy, class T>
  static bool near_sums(const T* t, const T* s, int64_t n, const Row& row, const Frame& frame, double before,
                        PairSums& out) {
    const NearTerms<sizeof(T) == 2> terms{frame, row.bits_per_logit};
    Sums sums = no_sums();
    F a, b, c, d, y, v, top = S::set(0.f), bottom = top;
    const int64_t whole = n / kPair * kPair;
    for (int64_t i = 0; i < whole; i += kPair) {
      S::prefetch(t + i + kBlock, kPair * sizeof(T));
      S::prefetch(s + i + kBlock, kPair * sizeof(T));
      S::load(t + i, a, b);
      S::load(s + i, c, d);
      terms(a, c, y, v);
      accumulate_near<kOtherEntropy>(y, v, sums, top, bottom);
      terms(b, d, y, v);
      accumulate_near<kOtherEntropy>(y, v, sums, top, bottom);
    }
    if (S::any_above(sums.total, kRise) || S::any_above(top, kFar) || S::any_above(negated(bottom), 126.f))
      return false;
    out = in_nats(sums, frame);
    out.weighted = -out.weighted;
    if (!kOtherEntropy) out.other_total = out.total + out.excess - out.weighted;
    // Rounding may leave less than nothing, which `moved` would take for a block without mass of q.
    if (out.other_total < 1e-30) out.other_total = 1e-30;
    // M far above B: the difference of this block has lost digits that the row's B, and so the gradient, would miss.
    if (whole && !(std::fabs(out.weighted) <= 16 * (out.other_total + before))) return false;
    out = terms.in_frame(out, row.inverse_temperature);
    if (whole < n) out = merged(out, general_sums(t + whole, s + whole, n - whole, row.bits_per_logit, frame), 1.0);
    return out.entropy == out.entropy && out.other_entropy == out.other_entropy;  // the other sums may hide a NaN
  }

  // Whether the references hide what is left of a block of weight behind their own error.
  static bool is_lossy(const PairSums& block, const PairSums& before, double inverse_temperature) {
    if (!hides_divergence(block)) return false;
    const double scale = before.empty() ? 0 : std::exp((before.reference - block.reference) * inverse_temperature);
    return block.total * 8 > scale * before.total;
  }

  // The references that make A and B equal.
  static Frame own_frame(const PairSums& sums, double inverse_temperature) {
    return {float(sums.reference), equal_reference(sums, inverse_temperature)};
  }

  template <bool kOtherEntropy, class T>
  static PairSums block_sums(const T* t, const T* s, int64_t n, const Row& row) {
    PairSums block;
    const double before = row.sums.total;  // and of B: the frame makes them equal
    if (row.next.reference != -INFINITY && near_sums<kOtherEntropy>(t, s, n, row, row.next, before, block))
      return block;
    const float peak = R::row_peak(t, n), other_peak = R::row_peak(s, n);
    if (peak == INFINITY || other_peak == INFINITY || R::has_nan(t, n) || R::has_nan(s, n)) return invalid_pair();
    if (peak == -INFINITY && other_peak == -INFINITY) return empty_pair();
    const Frame frame{peak == -INFINITY ? other_peak : peak, other_peak == -INFINITY ? peak : other_peak};
    return without_mass(general_sums(t, s, n, row.bits_per_logit, frame), peak == -INFINITY, other_peak == -INFINITY);
  }

  template <bool kOtherEntropy, class T>
  static void add_block(const T* t, const T* s, int64_t n, Row& row) {
    PairSums block = block_sums<kOtherEntropy>(t, s, n, row);
    if (is_lossy(block, row.sums, row.inverse_temperature)) {
      const Frame frame = own_frame(block, row.inverse_temperature);
      if (!near_sums<kOtherEntropy>(t, s, n, row, frame, 0, block))
        block = general_sums(t, s, n, row.bits_per_logit, frame);
    }
    row.sums = merged(row.sums, block, row.inverse_temperature);
    if (!(row.sums.total > 0 && row.sums.other_total > 0)) return;
    const Frame next = own_frame(row.sums, row.inverse_temperature);
    const float change = std::fabs(next.other_reference - row.next.other_reference) * row.bits_per_logit;
    if (next.reference != row.next.reference || !(change < 0x1p-7f)) row.next = next;
  }

  template <bool kOtherEntropy, class T>
  static void pair_statistics_of(const Pair& pair, int64_t row_first, int64_t row_last, int64_t first, int64_t last,
                                 PairStatistics* out) {
    if (last > pair.valid) last = pair.valid;
    for (int64_t r = row_first; r < row_last; ++r) {
      const T* t = static_cast<const T*>(pair.first) + pair.first_layout.offset(r);
      const T* s = static_cast<const T*>(pair.second) + pair.second_layout.offset(r);
      Row row{pair.inverse_temperature};
      for (int64_t i = first; i < last; i += kBlock)
        add_block<kOtherEntropy>(t + i, s + i, last - i < kBlock ? last - i : kBlock, row);
      out[r - row_first] = narrowed(row.sums);
    }
  }

  template <Kind kKind, class T>
  static void entry_sums_of(const Pair& pair, const Entries& entries, int64_t row_first, int64_t row_last,
                            int64_t first, int64_t last, EntrySums* out) {
    const float bits_per_logit = float(kLog2e * pair.inverse_temperature);
    const F limit = S::set(entries.limit), beta = S::set(entries.beta), rest = S::set(1.f - entries.beta);
    if (last > pair.valid) last = pair.valid;
    for (int64_t r = row_first; r < row_last; ++r) {
      const T* t = static_cast<const T*>(pair.first) + pair.first_layout.offset(r);
      const T* s = static_cast<const T*>(pair.second) + pair.second_layout.offset(r);
      const Normalised normalised(entries.scale[r], bits_per_logit);
      double value = 0, mass = 0, slope = 0;
      for (int64_t block = first; block < last; block += kBlock) {
        const int64_t end = last - block < kBlock ? last : block + kBlock;
        EntryTotals sums{S::set(0.f), S::set(0.f), S::set(0.f)};
        F a, b, c, d;
        for (int64_t i = block; i < end; i += kPair) {
          const bool tail = end - i < kPair;
          tail ? R::load_tail(t + i, end - i, a, b) : S::load(t + i, a, b);
          tail ? R::load_tail(s + i, end - i, c, d) : S::load(s + i, c, d);
          Base::template accumulate_entry<kKind>(normalised(a, c), limit, beta, rest, sums);
          Base::template accumulate_entry<kKind>(normalised(b, d), limit, beta, rest, sums);
        }
        value += S::sum(sums.value);
        mass += S::sum(sums.mass);
        slope += S::sum(sums.slope);
      }
      out[r - row_first] = {float(value), float(mass), float(slope)};
    }
  }

  template <Kind kKind, bool kClip, class T>
  static void pair_gradient_of(const Pair& pair, const Entries& entries, const PairGradient& g, int64_t row_first,
                               int64_t row_last) {
    const float bits_per_logit = float(kLog2e * pair.inverse_temperature);
    for (int64_t r = row_first; r < row_last; ++r) {
      const T* t = static_cast<const T*>(pair.first) + pair.first_layout.offset(r);
      const T* s = static_cast<const T*>(pair.second) + pair.second_layout.offset(r);
      T* out = static_cast<T*>(g.data) + g.layout.offset(r);
      const typename Base::template EntryGradients<kKind, kClip> gradient(
          entries, entry_gradient(kKind, g.sums[r], entries.beta), r, bits_per_logit,
          float(g.grad_value[r] * pair.inverse_temperature));
      F a, b, c, d;
      int64_t i = 0;
      for (; i + kPair <= pair.valid; i += kPair) {
        S::prefetch(t + i + kBlock, kPair * sizeof(T));
        S::prefetch(s + i + kBlock, kPair * sizeof(T));
        S::load(t + i, a, b);
        S::load(s + i, c, d);
        S::store(out + i, gradient(a, c), gradient(b, d));
      }
      if (i < pair.valid) {
        T last[kPair];
        R::load_tail(t + i, pair.valid - i, a, b);
        R::load_tail(s + i, pair.valid - i, c, d);
        S::store(last, gradient(a, c), gradient(b, d));
        std::memcpy(static_cast<void*>(out + i), last, (pair.valid - i) * sizeof(T));
      }
      std::memset(static_cast<void*>(out + pair.valid), 0, (pair.columns - pair.valid) * sizeof(T));
    }
  }

  template <class Call>
  static void with_element(Dtype dtype, const Call& call) {
    switch (dtype) {
      case Dtype::kFloat32: return call(Float32());
      case Dtype::kBFloat16: return call(BFloat16());
      case Dtype::kFloat16: return call(Float16());
    }
  }

  static void pair_statistics(const Pair& p, bool other_entropy, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                              PairStatistics* out) {
    with_element(p.dtype, [&](auto element) {
      using T = decltype(element);
      other_entropy ? pair_statistics_of<true, T>(p, r0, r1, c0, c1, out)
                    : pair_statistics_of<false, T>(p, r0, r1, c0, c1, out);
    });
  }

  static void entry_sums(const Pair& p, const Entries& e, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                         EntrySums* out) {
    with_element(p.dtype, [&](auto element) {
      using T = decltype(element);
      switch (e.kind) {
        case Kind::kForwardKl: return entry_sums_of<Kind::kForwardKl, T>(p, e, r0, r1, c0, c1, out);
        case Kind::kReverseKl: return entry_sums_of<Kind::kReverseKl, T>(p, e, r0, r1, c0, c1, out);
        case Kind::kJsd: return entry_sums_of<Kind::kJsd, T>(p, e, r0, r1, c0, c1, out);
      }
    });
  }

  template <Kind kKind, class T>
  static void pair_gradient_of(const Pair& p, const Entries& e, const PairGradient& g, int64_t r0, int64_t r1) {
    e.limit == INFINITY ? pair_gradient_of<kKind, false, T>(p, e, g, r0, r1)
                        : pair_gradient_of<kKind, true, T>(p, e, g, r0, r1);
  }

  static void pair_gradient(const Pair& p, const Entries& e, const PairGradient& g, int64_t r0, int64_t r1) {
    with_element(p.dtype, [&](auto element) {
      using T = decltype(element);
      switch (e.kind) {
        case Kind::kForwardKl: return pair_gradient_of<Kind::kForwardKl, T>(p, e, g, r0, r1);
        case Kind::kReverseKl: return pair_gradient_of<Kind::kReverseKl, T>(p, e, g, r0, r1);
        case Kind::kJsd: return pair_gradient_of<Kind::kJsd, T>(p, e, g, r0, r1);
      }
    });
  }
};

template <class S>
constexpr RowKernels entry_points() {
  using D = Divergence<S>;
  RowKernels kernels = Rows<S>::entry_points();
  kernels.pair = {&D::pair_statistics, &D::entry_sums, &D::pair_gradient};
  return kernels;
}

}  // namespace egrsd::cpu