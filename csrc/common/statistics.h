// The statistics of a row of logits, and the results from them: one definition for the CPU, for CUDA and for tests.
//
// With y_j = x_j log2(e) / temperature ("bits"), and sums over the columns of one part of the vocabulary (a block, a
// chunk, a shard) that leave out the target's own column:
//
//   reference  an integer c near max(y); -inf if the part holds no finite logit
//   rest       R = sum 2^(y_j - c)
//   weighted   S = sum 2^(y_j - c) (y_j - c) ln 2
//   target     d = (y_target - c) ln 2; -inf if the part does not hold the target
//
// Why this form. c is an integer, so moving to another reference scales R and S exactly. H = ln A - S / A does not
// cancel for offset logits, as lse - sum p x does. With the target left out of R, 1 - p(target) = R / A keeps its
// relative accuracy when the target is nearly certain, and so do log p(target) and its gradient.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define EGRSD_HOST_DEVICE __host__ __device__ __forceinline__
#define EGRSD_DEVICE __device__ __forceinline__
#else
#define EGRSD_HOST_DEVICE inline
#define EGRSD_DEVICE inline
#endif

namespace egrsd {

constexpr double kLn2 = 0.6931471805599453;
constexpr double kLog2e = 1.4426950408889634;
constexpr int64_t kIgnoreIndex = -100;
constexpr int64_t kNoTarget = -1;  // in no shard

struct Statistics {
  float reference, rest, weighted, target;
};
static_assert(sizeof(Statistics) == 16, "four floats a token: what one all-gather carries");

// A part without a finite logit, and the row of an ignored target (for which finish() gives zeros).
EGRSD_HOST_DEVICE Statistics empty_statistics() { return {-INFINITY, 0.f, 0.f, -INFINITY}; }
EGRSD_HOST_DEVICE Statistics ignored_statistics() { return {0.f, 0.f, 0.f, 0.f}; }

// `part` seen from `reference`, which is at least its own.
EGRSD_HOST_DEVICE Statistics moved(const Statistics& part, float reference) {
  if (part.reference == reference) return part;
  if (part.reference == -INFINITY) return {reference, part.rest, part.weighted, part.target};  // 0, or NaN
  const float bits = part.reference - reference, nats = float(kLn2) * bits;
  const float scale = ldexpf(1.f, int(bits > -300.f ? bits : -300.f));  // exact; 2^-300 is 0 in fp32
  return {reference, scale * part.rest, scale > 0.f ? scale * (part.weighted + nats * part.rest) : scale * part.rest,
          part.target + nats};
}

EGRSD_HOST_DEVICE float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

// Statistics of the union of two disjoint parts.
EGRSD_HOST_DEVICE Statistics merged(const Statistics& a, const Statistics& b) {
  const float reference = a.reference > b.reference ? a.reference : b.reference;
  const Statistics p = moved(a, reference), q = moved(b, reference);
  return {reference, p.rest + q.rest, p.weighted + q.weighted, max_or_nan(p.target, q.target)};
}

struct Result {
  double total, log_total;  // A = R + e^d, ln A
  double log_prob, entropy, log_normalizer;  // in nats; the last is ln sum e^(x_j / temperature)
};

// In fp64: it runs once a token, and H of a near-deterministic row is a small difference.
EGRSD_HOST_DEVICE Result finish(const Statistics& s) {
  const double target = s.target, at_target = exp(target);
  const double total = s.rest + at_target, log_total = log(total);
  const double weighted = s.weighted + (at_target > 0 ? target * at_target : 0.0);
  const double entropy = log_total - weighted / total;
  const double log_prob = at_target > s.rest ? 0.0 - log1p(s.rest / at_target) : target - log_total;
  return {total, log_total, log_prob, entropy < 0 ? 0.0 : entropy,  // a NaN stays one
          log_total + kLn2 * double(s.reference)};
}

// d(g log_prob + h entropy + l log_normalizer)/dx_j = 2^(y_j - c) (constant + slope (y_j - c)), and `at_target` for the
// target's column.
struct GradientCoefficients {
  float constant, slope, at_target;
};

EGRSD_HOST_DEVICE GradientCoefficients gradient_coefficients(const Statistics& s, double grad_log_prob,
                                                             double grad_entropy, double grad_log_normalizer,
                                                             double inverse_temperature) {
  const Result r = finish(s);
  const double scale = inverse_temperature / r.total, at_target = exp(double(s.target));
  const double entropy_term = at_target > 0 ? grad_entropy * at_target * (r.log_prob + r.entropy) : 0.0;
  return {float(scale * (grad_entropy * (r.log_total - r.entropy) - grad_log_prob + grad_log_normalizer)),
          float(-scale * grad_entropy * kLn2),
          float(scale * (grad_log_prob * s.rest - entropy_term + grad_log_normalizer * at_target))};
}

}  // namespace egrsd
