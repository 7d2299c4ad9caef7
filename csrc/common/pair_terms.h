// What each column of two tensors of logits adds to the sums of divergence.h, and its gradient, over lanes S as in
// pair_columns.h: the first reading for rows of any kind, and the second reading.
#pragma once
#include "pair_columns.h"

namespace egrsd {

template <class S>
struct PairTerms : PairColumns<S> {
  using Base = PairColumns<S>;
  using F = typename S::F;
  using Columns = typename Base::Columns;
  using Mixture = typename Base::Mixture;
  using Base::bounded, Base::columns, Base::negated;

  struct Sums {
    F total, other_total, weighted, excess, entropy, other_entropy;  // PairStatistics; logarithms in bits
  };

  struct Frame {
    float reference, other_reference;
  };

  static EGRSD_DEVICE Sums no_sums() {
    const F zero = S::set(0.f);
    return {zero, zero, zero, zero, zero, zero};
  }

  // Sums of columns of any kind.
  static EGRSD_DEVICE void accumulate(F t, F s, F bits, const Frame& frame, Sums& sums) {
    const F x = S::sub(t, S::set(frame.reference)), other = S::sub(s, S::set(frame.other_reference));
    const F y = bounded(S::mul(x, bits)), z = bounded(S::mul(other, bits));
    const Columns c = columns(y, z, S::mul(S::sub(other, x), bits));
    const F e = c.p(), f = c.q();
    sums.total = S::add(sums.total, e);
    sums.other_total = S::add(sums.other_total, f);
    sums.weighted = S::fma(e, c.pick(negated(c.low), c.clamped), sums.weighted);
    sums.excess = S::fma(c.high, c.forward(), sums.excess);
    sums.entropy = S::fma(e, y, sums.entropy);
    sums.other_entropy = S::fma(f, z, sums.other_entropy);
  }

  // The second reading: p is the teacher's distribution, q the student's, both normalised by `scale`.
  struct Normalised {
    F bits, reference, other_reference, scale, other_scale, log_ratio;
    EGRSD_DEVICE Normalised(const PairScale& k, float bits_per_logit)
        : bits(S::set(bits_per_logit)), reference(S::set(k.reference)), other_reference(S::set(k.other_reference)),
          scale(S::set(k.scale)), other_scale(S::set(k.other_scale)), log_ratio(S::set(k.log_ratio)) {}
    EGRSD_DEVICE Columns operator()(F t, F s) const {
      const F x = S::sub(t, reference), other = S::sub(s, other_reference);
      const F y = bounded(S::mul(x, bits)), z = bounded(S::mul(other, bits));
      Columns c = columns(y, z, S::fma(S::sub(other, x), bits, log_ratio));
      c.high = S::mul(c.high, c.pick(scale, other_scale));
      return c;
    }
  };

  struct EntryTotals {
    F value, mass, slope;
  };

  template <Kind kKind>
  static EGRSD_DEVICE void accumulate_entry(const Columns& c, F limit, F beta, F one_minus_beta, EntryTotals& sums) {
    const F zero = S::set(0.f);
    if (kKind == Kind::kJsd) {
      const Mixture mixture(c, beta, one_minus_beta);
      const F value = S::mul(c.high, mixture.value), log = S::sub(c.pick(c.log_smaller(), zero), mixture.log_m);
      const F q = c.q();
      sums.value = S::add(sums.value, S::select_above(value, limit, limit, value));
      sums.mass = S::add(sums.mass, q);
      sums.slope = S::add(sums.slope, S::select_above(value, limit, zero, S::mul(q, log)));
      return;
    }
    // The entry p ln(p / q), positive if p is larger, is p - q and what `forward` adds to it: all p - q sum to 0.
    constexpr bool kForward = kKind == Kind::kForwardKl;
    const F larger = S::mul(c.high, c.distance()), entry = kForward ? c.pick(larger, zero) : c.pick(zero, larger);
    const F beyond = S::mul(c.high, kForward ? c.forward() : c.reverse());
    const F at_limit = S::fma(c.high, c.power.minus_one(), limit);
    sums.value = S::add(sums.value, S::select_above(entry, limit, at_limit, beyond));
    sums.mass = S::add(sums.mass, S::select_above(entry, limit, c.high, zero));
    if (!kForward) {
      sums.slope = S::add(sums.slope, S::select_above(entry, limit, zero, S::mul(c.q(), c.log_ratio())));
    }
  }

  template <Kind kKind, bool kClip>
  struct EntryGradients {
    Normalised normalised;
    F limit, beta, one_minus_beta, factor, below, above;
    EGRSD_DEVICE EntryGradients(const Entries& e, const EntryGradient& g, int64_t row, float bits_per_logit,
                                float scale)
        : normalised(e.scale[row], bits_per_logit), limit(S::set(e.limit)), beta(S::set(e.beta)),
          one_minus_beta(S::set(1.f - e.beta)), factor(S::set(scale * g.factor)), below(S::set(g.below)),
          above(S::set(scale * g.above)) {}

    EGRSD_DEVICE F operator()(F t, F s) const {
      const Columns c = normalised(t, s);
      const F zero = S::set(0.f);
      F value, entry;
      if (kKind == Kind::kForwardKl) {
        const F difference = S::mul(c.high, c.power.minus_one());  // the smaller minus the larger
        value = c.pick(difference, negated(difference));
        if (kClip) value = S::fma(negated(c.q()), below, value);
        if (kClip) entry = c.pick(S::mul(c.high, c.distance()), zero);
      } else if (kKind == Kind::kReverseKl) {
        value = S::mul(c.q(), S::sub(c.log_ratio(), below));
        if (kClip) entry = c.pick(zero, S::mul(c.high, c.distance()));
      } else {
        const Mixture mixture(c, beta, one_minus_beta);
        value = S::mul(c.q(), S::sub(S::sub(c.pick(c.log_smaller(), zero), mixture.log_m), below));
        if (kClip) entry = S::mul(c.high, mixture.value);
      }
      value = S::mul(value, factor);
      return kClip ? S::select_above(entry, limit, S::mul(c.q(), above), value) : value;
    }
  };
};

}  // namespace egrsd
