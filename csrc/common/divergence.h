// The divergence of two rows of logits, t and s: one definition for the CPU, for CUDA and for tests.
//
// With references r and r' in the logits' own units, y_j = (t_j - r) log2(e) / temperature and z_j = (s_j - r')
// log2(e) / temperature ("bits"), and sums over the columns of one part of the vocabulary (a block, a chunk, a shard):
//
//   e_j = 2^(y_j), f_j = 2^(z_j), w_j = (y_j - z_j) ln 2 = ln(e_j / f_j)
//   A = sum e, B = sum f, M = sum e w, G = sum (f - e + e w)
//
// Why this form. Of two distributions that differ by a small d, sum p d loses all digits: its terms are of the first
// order in d, and their sum is of the second. The terms of G are never negative, of the second order in w, and computed
// without a cancellation. For any references
//
//   KL(p || q) = G / A - (a - ln(1 + a)) with a = B / A - 1 = (G - M) / A,
//
// so one reading can do with an estimate of r' - r: if that makes a = x, about x^2 / 2 of G cancels again. Logits less
// a reference near them are exact, so that an offset of one model's logits costs no digits either.
#pragma once
#include "logits.h"

namespace egrsd {

struct PairStatistics {
  float reference;        // r; -inf: the part is empty
  float other_reference;  // r'
  float total;            // A
  float other_total;      // B
  float weighted;         // M; +inf if q is 0 where p is not
  float excess;           // G
  float entropy;          // sum e y ln 2
  float other_entropy;    // sum f z ln 2, or 0 if nobody asked for q's entropy
};
static_assert(sizeof(PairStatistics) == 32, "eight floats a token: what one all-gather carries");

// The same in fp64, for sums over parts.
struct PairSums {
  double reference, other_reference, total, other_total, weighted, excess, entropy, other_entropy;

  EGRSD_HOST_DEVICE bool empty() const { return reference == -INFINITY; }
};

EGRSD_HOST_DEVICE PairSums empty_pair() { return {-INFINITY, -INFINITY, 0, 0, 0, 0, 0, 0}; }
EGRSD_HOST_DEVICE PairSums invalid_pair() { return {0, 0, NAN, NAN, NAN, NAN, NAN, NAN}; }

EGRSD_HOST_DEVICE PairSums widened(const PairStatistics& s) {
  return {s.reference, s.other_reference, s.total, s.other_total, s.weighted, s.excess, s.entropy, s.other_entropy};
}
EGRSD_HOST_DEVICE PairStatistics narrowed(const PairSums& s) {
  return {float(s.reference), float(s.other_reference), float(s.total),   float(s.other_total),
          float(s.weighted),  float(s.excess),          float(s.entropy), float(s.other_entropy)};
}

// Sums of a part in which one of the two has no mass at all: its -inf, for which kernels may sum 2^-126, are nothing.
EGRSD_HOST_DEVICE PairSums without_mass(PairSums s, bool no_p, bool no_q) {
  if (no_p) {
    s.total = s.weighted = s.entropy = 0;
    s.excess = s.other_total;
  }
  if (no_q) s.other_total = s.other_entropy = 0;  // M is infinite already
  return s;
}

// e^x - 1 and e^x, by a shorter way if x is no more than what fp32 leaves of a reference; its error is 1.7e-16.
EGRSD_HOST_DEVICE double change_by(double x) { return fabs(x) < 1e-5 ? x + 0.5 * x * x : expm1(x); }
EGRSD_HOST_DEVICE double factor_of(double x) { return fabs(x) < 1e-5 ? 1 + change_by(x) : exp(x); }

// `part` seen from other references. x is what that takes from every w.
EGRSD_HOST_DEVICE PairSums moved(const PairSums& part, double reference, double other_reference,
                                 double inverse_temperature) {
  // a sum of nothing has no reference
  const double shift = part.total > 0 ? (part.reference - reference) * inverse_temperature : 0;
  const double other_shift = part.other_total > 0 ? (part.other_reference - other_reference) * inverse_temperature : 0;
  const double scale = factor_of(shift), other_scale = factor_of(other_shift), x = other_shift - shift;
  const double change = change_by(x);
  const double total = scale * part.total, other_total = other_scale * part.other_total;
  const double weighted = scale * (part.weighted - x * part.total);
  // A small x leaves terms of the second order only; a large one leaves nothing that could cancel.
  const double excess =
      fabs(x) < 0.5 ? scale * ((1 + change) * part.excess - change * part.weighted + (change - x) * part.total)
                    : other_total - total + weighted;
  return {reference, other_reference, total, other_total, weighted, excess,
          scale * (part.entropy + shift * part.total),
          other_scale * (part.other_entropy + other_shift * part.other_total)};
}

// Sums of the union of two disjoint parts: seen from the higher r, and from the r' that belongs to more of p.
EGRSD_HOST_DEVICE PairSums merged(PairSums a, PairSums b, double inverse_temperature) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  if (a.reference != b.reference || a.other_reference != b.other_reference) {
    const bool a_leads = !(b.total > 0) || (a.total > 0 && a.reference >= b.reference);
    const double reference = a_leads ? a.reference : b.reference;
    const double a_mass = a.other_total > 0 ? a.total * exp((a.reference - reference) * inverse_temperature) : -1;
    const double b_mass = b.other_total > 0 ? b.total * exp((b.reference - reference) * inverse_temperature) : -1;
    double other = reference + (a_mass >= b_mass ? a.other_reference - a.reference : b.other_reference - b.reference);
    // q may have its mass elsewhere: no f may grow beyond all bounds.
    const double highest = other + 6 / inverse_temperature;
    if (a.other_total > 0 && a.other_reference > highest) other = a.other_reference;
    if (b.other_total > 0 && b.other_reference > highest && b.other_reference > other) other = b.other_reference;
    other = double(float(other));  // as it will be kept
    a = moved(a, reference, other, inverse_temperature);
    b = moved(b, reference, other, inverse_temperature);
  }
  return {a.reference,             a.other_reference,   a.total + b.total,     a.other_total + b.other_total,
          a.weighted + b.weighted, a.excess + b.excess, a.entropy + b.entropy, a.other_entropy + b.other_entropy};
}

// The union of `parts` of one token, `stride` apart.
EGRSD_HOST_DEVICE PairSums merged_over_parts(const PairStatistics* part, int64_t parts, int64_t stride,
                                             double inverse_temperature) {
  PairSums sums = widened(part[0]);
  for (int64_t k = 1; k < parts; ++k) sums = merged(sums, widened(part[k * stride]), inverse_temperature);
  return sums;
}

// Whether A and B are so close that B / A - 1 is better known from G and M than from A and B.
EGRSD_HOST_DEVICE bool close(const PairSums& s) { return s.excess + fabs(s.weighted) < 0.5 * s.total; }

EGRSD_HOST_DEVICE double log_total_ratio(const PairSums& s) {  // ln(A / B)
  return close(s) ? -log1p((s.excess - s.weighted) / s.total) : log(s.total / s.other_total);
}

// The r' that makes A and B equal, as far as fp32 holds it.
EGRSD_HOST_DEVICE float equal_reference(const PairSums& s, double inverse_temperature) {
  return float(s.other_reference - log_total_ratio(s) / inverse_temperature);
}

struct PairResult {
  double divergence, entropy, other_entropy;  // KL(p || q) and the entropies of p and q, in nats
  double log_ratio;                           // ln(A / B)
};

EGRSD_HOST_DEVICE PairResult finish(const PairSums& s) {
  const double log_ratio = log_total_ratio(s), change = (s.excess - s.weighted) / s.total;
  double divergence = close(s) ? s.excess / s.total - (change + log_ratio) : s.weighted / s.total - log_ratio;
  if (s.weighted == INFINITY) divergence = INFINITY;
  const double entropy = log(s.total) - s.entropy / s.total;
  const double other_entropy = log(s.other_total) - s.other_entropy / s.other_total;
  return {divergence < 0 ? 0.0 : divergence, entropy < 0 ? 0.0 : entropy, other_entropy < 0 ? 0.0 : other_entropy,
          log_ratio};
}

// Whether the references hide the divergence behind their own error: it is a small part of an excess that counts.
constexpr double kLeastExcess = 4e-6, kHiddenShare = 1.0 / 64;
EGRSD_HOST_DEVICE bool hides_divergence(const PairSums& s) {
  return s.excess > kLeastExcess * s.total && finish(s).divergence * s.total < kHiddenShare * s.excess;
}

// How the second reading of a row normalises it: p_j = 2^(y_j) scale, q_j = 2^(z_j) other_scale and
// log2(q_j / p_j) = z_j - y_j + log_ratio.
struct PairScale {
  float reference, other_reference, scale, other_scale, log_ratio;
};

enum class Kind { kForwardKl, kReverseKl, kJsd };

// Sums over columns of the normalised distributions, which simply add up over parts. p is the teacher's distribution, q
// the student's, m = beta p + (1 - beta) q. An entry above the limit counts as the limit ("clipped"), without gradient.
//
//              value: the sum of           mass: over the clipped         slope: over the others
//   forward    p ln(p / q)                 p                              0
//   reverse    q ln(q / p)                 q                              q ln(q / p)
//   jsd        beta p ln(p / m) + (1 - beta) q ln(q / m)   q of all       q ln(q / m)
//
// JSD's mass is 1 but for the rounding of q's normaliser. Where p and q are far apart ln(q / m) is the same number for
// all columns of weight, so that l - slope would be little more than that rounding; slope / mass has none of it.
struct EntrySums {
  float value, mass, slope;
};

EGRSD_HOST_DEVICE EntrySums merged(const EntrySums& a, const EntrySums& b) {
  return {a.value + b.value, a.mass + b.mass, a.slope + b.slope};
}

// d value / dz_j, in nats, of an entry below the limit and of one above it, with l = ln(q_j / p_j) or ln(q_j / m_j).
//   forward    (q_j - p_j) - q_j below           q_j above
//   reverse    q_j (l - below)                   q_j above
//   jsd        q_j factor (l - below)            q_j above
struct EntryGradient {
  float factor, below, above;
};

EGRSD_HOST_DEVICE EntryGradient entry_gradient(Kind kind, const EntrySums& s, double beta) {
  if (kind == Kind::kForwardKl) return {1.f, s.mass, 1.f - s.mass};
  if (kind == Kind::kReverseKl) return {1.f, s.slope - s.mass, s.mass - s.slope - 1.f};
  const float slope = s.slope / s.mass;
  return {float(1 - beta), slope, float((beta - 1) * slope)};
}

// Two tensors of logits [rows, columns]: the columns [0, valid) of both are real tokens.
struct Pair {
  const void *first, *second;
  Dtype dtype;
  RowLayout first_layout, second_layout;
  int64_t rows, columns, valid;
  double inverse_temperature;
};

// What the second reading does: the first tensor is the teacher's, the second the student's.
struct Entries {
  const PairScale* scale;  // [rows]
  Kind kind;
  float limit, beta;  // limit: +inf clips nothing
};

struct PairGradient {
  void* data;  // [rows, columns] of the logits' dtype; may be the student's logits
  RowLayout layout;
  const EntrySums* sums;    // [rows], of the whole vocabulary
  const float* grad_value;  // [rows]
};

// What a token's statistics come to: KL(p || q), the teacher's entropy, and the scale of the second reading.
struct PairValues {
  float divergence, teacher_entropy;
  PairScale scale;  // in the roles of Entries
};

EGRSD_HOST_DEVICE PairValues pair_values(const PairSums& s, double inverse_temperature, bool student_first) {
  const PairResult r = finish(s);
  double other_reference = s.other_reference, other_total = s.other_total, log_ratio = r.log_ratio;
  // Where A and B are far apart, log2(q / p) of a column would be the small difference of large numbers.
  if (fabs(log_ratio) > 0.5 && fabs(log_ratio) < INFINITY) {
    other_reference = double(equal_reference(s, inverse_temperature));
    const double shift = (other_reference - s.other_reference) * inverse_temperature;
    other_total *= exp(-shift);
    log_ratio += shift;
  }
  const PairScale scale = {float(s.reference), float(other_reference), float(1 / s.total), float(1 / other_total),
                           float(kLog2e * log_ratio)};
  if (!student_first) return {float(r.divergence), float(r.entropy), scale};
  return {float(r.divergence),
          float(r.other_entropy),
          {scale.other_reference, scale.reference, scale.other_scale, scale.scale, -scale.log_ratio}};
}

}  // namespace egrsd
