// One column of two distributions p and q over lanes S: their larger probability, their ratio, and what divergence.h
// makes of the two, without a cancellation and without an overflow.
//
// S is a SIMD type of the CPU (../cpu/simd_*.cpp) or one float of a CUDA thread (../cuda/lane.h). It provides F, set,
// add, sub, mul, div, fma (a b + c), max and min (that keep a NaN of their second operand; min also gives that operand
// if the first one is NaN), select_above(a, b, x, y) = a > b ? x : y (y for NaN), exp2, exp2_integer (2^n of integers n
// in [-126, 127]), normalised(x, n) = x 2^-n in [2/3, 4/3), and kExp2IsBounded: exp2 takes only [-126, 127] and NaN.
#pragma once
#include "divergence.h"

namespace egrsd {

template <class S>
struct PairColumns {
  using F = typename S::F;
  static constexpr float kNats = float(kLn2);

  static EGRSD_DEVICE F negated(F x) { return S::sub(S::set(0.f), x); }

  // Clamp y to the range of exp2, so that y 2^y is finite.
  static EGRSD_DEVICE F bounded(F y) {
    y = S::max(S::set(-126.f), y);
    return S::kExp2IsBounded ? S::min(S::set(127.f), y) : y;
  }

  // 2^x - 1 - x ln 2 = x^2 h(x) for x in [-1/2, 1/2], with a relative error of 1.3e-7.
  static EGRSD_DEVICE F second_order(F x) {
    F h = S::fma(S::set(1.5417278e-4f), x, S::set(1.3381250e-3f));
    h = S::fma(h, x, S::set(9.6181724e-3f));
    h = S::fma(h, x, S::set(5.5503812e-2f));
    h = S::fma(h, x, S::set(2.4022651e-1f));
    return S::mul(S::mul(x, x), h);
  }

  // What 2^v = 2^n 2^x, v in [-126, 127], says of a ratio of probabilities; no member cancels for a small v.
  struct Power {
    F n, scale, change, curvature, excess;  // n; 2^n; 2^x - 1; 2^x - 1 - x ln 2; 2^v - 1 - v ln 2
    EGRSD_DEVICE F ratio() const { return S::fma(scale, change, scale); }
    // 1 - 2^v + 2^v v ln 2, for v <= 0
    EGRSD_DEVICE F complement(F v) const {
      const F nats = S::set(kNats), fraction = S::sub(S::mul(S::mul(nats, v), change), curvature);
      return S::fma(scale, fraction, S::fma(S::mul(scale, n), nats, S::sub(S::set(1.f), scale)));
    }
    EGRSD_DEVICE F minus_one() const { return S::fma(scale, change, S::sub(scale, S::set(1.f))); }
  };
  static EGRSD_DEVICE Power power(F v) {
    const F magic = S::set(12582912.f), n = S::sub(S::add(v, magic), magic), x = S::sub(v, n);
    const F scale = S::exp2_integer(n), curvature = second_order(x);
    const F linear = S::fma(S::set(kNats), x, S::set(1.f)), subtracted = S::fma(S::set(-kNats), v, S::set(-1.f));
    const F rest = S::fma(scale, linear, subtracted);  // exactly 0 if v is x
    return {n, scale, S::fma(S::set(kNats), x, curvature), curvature, S::fma(scale, curvature, rest)};
  }

  // One column in general: from the larger of the two probabilities and their ratio, so that nothing overflows.
  // -inf counts as no mass; where both are -inf the ratio is one.
  struct Columns {
    F v, low, high;   // log2(q / p); -|v|; the larger probability
    Power power;      // of max(-|v|, -126)
    F clamped;        // that
    EGRSD_DEVICE F pick(F if_p_is_larger, F else_) const {
      return S::select_above(S::set(0.f), v, if_p_is_larger, else_);
    }
    EGRSD_DEVICE F p() const { return pick(high, S::mul(high, power.ratio())); }
    EGRSD_DEVICE F q() const { return pick(S::mul(high, power.ratio()), high); }
    EGRSD_DEVICE F distance() const { return S::mul(S::set(-kNats), low); }  // |ln(q / p)|, unclamped
    EGRSD_DEVICE F log_smaller() const { return S::mul(S::set(kNats), clamped); }  // ln(smaller / larger), clamped
    EGRSD_DEVICE F log_ratio() const { return pick(log_smaller(), distance()); }  // ln(q / p), clamped where q is small
    // (q - p - p ln(q / p)) / high: what p ln(p / q) adds beyond p - q; and the same with p and q exchanged.
    EGRSD_DEVICE F forward() const { return pick(near(), power.complement(clamped)); }
    EGRSD_DEVICE F reverse() const { return pick(power.complement(clamped), near()); }
   private:
    EGRSD_DEVICE F near() const { return S::fma(S::set(kNats), S::sub(clamped, low), power.excess); }
  };
  static EGRSD_DEVICE Columns columns(F y, F z, F v) {
    Columns c;
    c.v = v;
    c.low = S::min(S::min(v, negated(v)), S::set(0.f));  // 0 for NaN
    c.clamped = S::max(c.low, S::set(-126.f));
    c.power = power(c.clamped);
    c.high = S::exp2(c.pick(y, z));
    return c;
  }

  // ln m less ln of the larger of p and q; JSD's entry over the larger one.
  struct Mixture {
    F log_m, value;
    EGRSD_DEVICE Mixture(const Columns& c, F beta, F one_minus_beta) {
      const F one = S::set(1.f), two = S::set(2.f);
      const F share = c.pick(one_minus_beta, beta), x = S::mul(share, c.power.minus_one()), m = S::add(one, x);
      F n;
      const F mantissa = S::normalised(m, n);
      const F y = S::select_above(S::set(0.f), n, S::sub(mantissa, one), x);  // m <= 1: n is 0 or negative
      const F s = S::div(y, S::add(two, y)), ss = S::mul(s, s);  // ln(1 + y) = 2 artanh(s)
      const F series = S::fma(S::fma(S::set(0.14978334f), ss, S::set(0.19989488f)), ss, S::set(0.33333358f));
      const F cube = S::mul(S::mul(s, ss), series);
      log_m = S::fma(S::set(kNats), n, S::mul(two, S::add(s, cube)));
      // m ln m - x is of the second order in x.
      const F close = S::mul(S::add(two, x), S::fma(S::add(one, s), cube, ss));
      const F entropy = S::select_above(S::set(0.f), n, S::sub(S::mul(m, log_m), x), close);
      value = S::sub(S::mul(share, c.power.complement(c.clamped)), entropy);
    }
  };
};

}  // namespace egrsd
