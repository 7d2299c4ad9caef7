// The first reading of two rows: the sums of ../common/divergence.h by a block of threads.
//
// Both references are common to the block but for whole bits by which a thread has raised both, so that w of every
// column has one meaning and the threads' sums merge by exact factors. They come from a sample of the row. If the
// sample was not like the row, so that the estimate of r' - r hides the divergence, the row is read a second time.
#pragma once
#include "../common/pair_terms.h"
#include "lane.h"
#include "pair_part.h"

namespace egrsd::cuda {

using Terms = PairTerms<Lane>;

constexpr float kRise = 512.f;  // of the sum of a batch: its thread's reference is then raised
constexpr float kFar = 64.f;    // bits; where |log2(q / p)| is larger, p may underflow while q is of weight

// Sums where |log2(q / p)| <= kFar; all logarithms in bits, the references whole bits and 1/256 of one.
struct NearSums {
  float reference, other_reference, total, other_total, change, excess, entropy, other_entropy;
  float farthest;  // the largest |log2(q / p)|
};

// `sums` seen from a reference that is higher by whole bits, and from r' higher by as many.
__device__ __forceinline__ NearSums raised(NearSums sums, float reference) {
  const float shift = sums.reference - reference, scale = Lane::exp2_integer(fmaxf(shift, -126.f));
  const float other_reference = sums.other_reference - shift;
  if (other_reference - reference != sums.other_reference - sums.reference) sums.farthest = INFINITY;  // not exact
  return {reference,
          other_reference,
          scale * sums.total,
          scale * sums.other_total,
          scale * sums.change,
          scale * sums.excess,
          scale * fmaf(shift, sums.total, sums.entropy),
          scale * fmaf(shift, sums.other_total, sums.other_entropy),
          sums.farthest};
}

__device__ __forceinline__ NearSums added(const NearSums& a, const NearSums& b) {
  return {a.reference,
          a.other_reference,
          a.total + b.total,
          a.other_total + b.other_total,
          a.change + b.change,
          a.excess + b.excess,
          a.entropy + b.entropy,
          a.other_entropy + b.other_entropy,
          fmaxf(a.farthest, b.farthest)};
}

__device__ __forceinline__ NearSums merged(const NearSums& a, const NearSums& b) {
  const float reference = fmaxf(a.reference, b.reference);
  return added(raised(a, reference), raised(b, reference));
}

template <bool kOtherEntropy>
struct NearAdder {
  float bits;
  NearSums sums;

  template <int K>
  __device__ __forceinline__ void add(const float* t, const float* s) {
    NearSums batch = batch_sums<K>(t, s);
    if (!(batch.total <= kRise)) {  // rare: done again from a higher reference
      float peak = t[0];
#pragma unroll
      for (int i = 1; i < K; ++i) peak = fmaxf(peak, t[i]);
      const float needed = ceilf(peak * bits);
      if (needed > sums.reference && needed < INFINITY) {
        sums = raised(sums, needed);
        batch = batch_sums<K>(t, s);
      }
    }
    sums = added(sums, batch);
  }

  template <int K>
  __device__ __forceinline__ NearSums batch_sums(const float* t, const float* s) const {
    NearSums batch{sums.reference, sums.other_reference, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const float y = fmaf(t[i], bits, -sums.reference), z = fmaf(s[i], bits, -sums.other_reference);
      const float v = z - y, e = exp2_approx(y), ratio = exp2_approx(v);
      const float direct = fmaf(-Terms::kNats, v, ratio - 1.f), series = Terms::second_order(v);
      batch.farthest = fmaxf(batch.farthest, fabsf(v));
      batch.total += e;
      batch.change = fmaf(e, v, batch.change);  // infinite or NaN if v is
      batch.excess = fmaf(e, fabsf(v) < 0.5f ? series : direct, batch.excess);
      batch.entropy = fmaf(e, y, batch.entropy);
      if (kOtherEntropy) {
        const float f = e * ratio;
        batch.other_total += f;
        batch.other_entropy = fmaf(f, z, batch.other_entropy);
      }
    }
    return batch;
  }
};

__device__ __forceinline__ PairStatistics marked_statistics() { return {INFINITY, 0, 0, 0, 0, 0, 0, 0}; }
__device__ __forceinline__ bool is_marked(const PairStatistics& s) { return s.reference == INFINITY; }

// The factor of the logits in bits, in fp32 as all columns meet it, and its inverse.
struct Unit {
  float bits;
  double logits;
};

struct NearResult {
  bool found;  // false: the row is not of this kind
  NearSums sums;

  // From references in bits to the nearest ones that fp32 has in logits.
  __device__ __forceinline__ PairStatistics statistics(const Unit& unit) const {
    if (sums.reference == -INFINITY) return narrowed(empty_pair());
    const double inverse_temperature = kLn2 * double(unit.bits);
    const PairSums exact{sums.reference * unit.logits, sums.other_reference * unit.logits, sums.total,
                         sums.other_total,             -kLn2 * sums.change,                sums.excess,
                         kLn2 * sums.entropy,          kLn2 * sums.other_entropy};
    return narrowed(moved(exact, double(float(exact.reference)), double(float(exact.other_reference)),
                          inverse_temperature));
  }
};

// r' that makes A and B equal, to 1/256 of a bit: so little is left of the difference that it hides nothing.
__device__ __forceinline__ float equal_bits(float other_reference, float log2_ratio) {
  return rintf((other_reference + log2_ratio) * 256.f) * (1.f / 256.f);
}

struct Peaks {
  float first, second;
};

// The references from a sample of the part; infinite or NaN where the sample has no finite logits.
template <class T>
__device__ __forceinline__ Peaks sampled_references(const PairPart<T>& part, float bits) {
  float t[PairPart<T>::kWidth], s[PairPart<T>::kWidth];
  part.sample(t, s);
  Peaks peaks{t[0], s[0]};
#pragma unroll
  for (int i = 1; i < PairPart<T>::kWidth; ++i) peaks = {fmaxf(peaks.first, t[i]), fmaxf(peaks.second, s[i])};
  peaks = merged_over_block(peaks, [](const Peaks& a, const Peaks& b) {
    return Peaks{fmaxf(a.first, b.first), fmaxf(a.second, b.second)};
  });
  const float reference = ceilf(peaks.first * bits), other_reference = ceilf(peaks.second * bits);
  struct Totals {
    float first, second;
  } totals{0.f, 0.f};
#pragma unroll
  for (int i = 0; i < PairPart<T>::kWidth; ++i) {
    totals.first += exp2_approx(fmaf(t[i], bits, -reference));
    totals.second += exp2_approx(fmaf(s[i], bits, -other_reference));
  }
  totals = merged_over_block(totals, [](const Totals& a, const Totals& b) {
    return Totals{a.first + b.first, a.second + b.second};
  });
  return {reference, equal_bits(other_reference, log2f(divide_approx(totals.second, totals.first)))};
}

template <class T, bool kOtherEntropy>
__device__ __forceinline__ NearResult near_sums(const PairPart<T>& part, float bits) {
  Peaks references = sampled_references(part, bits);
  NearResult result{true, {-INFINITY, -INFINITY, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f}};
  if (!part.has_ends && part.first == part.last) return result;
  result.found = fabsf(references.first) < INFINITY && fabsf(references.second) < INFINITY;
  if (!result.found) return result;
  for (bool again = true;; again = false) {
    NearAdder<kOtherEntropy> adder{bits, {references.first, references.second, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f}};
    part.each(adder);
    NearSums& sums = result.sums;
    sums = merged_over_block(adder.sums, [](const NearSums& a, const NearSums& b) { return merged(a, b); });
    const float total = sums.total, weighted = -Terms::kNats * sums.change;
    if (!kOtherEntropy) sums.other_total = total + sums.excess - weighted;
    // Below a small B its difference has lost digits that B, and so the gradient, would miss. A NaN fails too.
    result.found = sums.farthest <= kFar && total > 0.f && fabsf(weighted) <= 16.f * sums.other_total &&
                   sums.entropy == sums.entropy && sums.other_entropy == sums.other_entropy;
    if (!result.found || !again) return result;
    const float ratio = divide_approx(sums.excess - weighted, total);
    const bool close = sums.excess + fabsf(weighted) < 0.5f * total;
    const float log_ratio = close ? log1pf(ratio) : logf(divide_approx(sums.other_total, total));  // ln(B / A)
    const float divergence = close ? sums.excess - total * (ratio - log_ratio) : weighted + total * log_ratio;
    const bool hidden = sums.excess > float(kLeastExcess) * total && divergence < float(kHiddenShare) * sums.excess;
    if (!hidden) return result;
    references = {sums.reference, equal_bits(sums.other_reference, float(kLog2e) * log_ratio)};
  }
}

struct GeneralPeaks {
  float first = -INFINITY, second = -INFINITY, nan = 0.f;

  template <int K>
  __device__ __forceinline__ void add(const float* t, const float* s) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      first = fmaxf(first, t[i]);
      second = fmaxf(second, s[i]);
      if (t[i] != t[i] || s[i] != s[i]) nan = 1.f;
    }
  }
};

struct GeneralAdder {
  float bits;
  Terms::Frame frame;
  Terms::Sums sums;

  template <int K>
  __device__ __forceinline__ void add(const float* t, const float* s) {
#pragma unroll
    for (int i = 0; i < K; ++i) Terms::accumulate(t[i], s[i], bits, frame, sums);
  }
};

template <class T>
__device__ PairSums general_sums_from(const PairPart<T>& part, double inverse_temperature, Terms::Frame frame) {
  GeneralAdder adder{float(kLog2e * inverse_temperature), frame, Terms::no_sums()};
  part.each(adder);
  const Terms::Sums s = merged_over_block(adder.sums, [](const Terms::Sums& a, const Terms::Sums& b) {
    return Terms::Sums{a.total + b.total,       a.other_total + b.other_total, a.weighted + b.weighted,
                       a.excess + b.excess,     a.entropy + b.entropy,         a.other_entropy + b.other_entropy};
  });
  return {frame.reference, frame.other_reference, s.total,          s.other_total,
          kLn2 * s.weighted, s.excess,            kLn2 * s.entropy, kLn2 * s.other_entropy};
}

// Rows of any kind: a reading for the peaks, one for the sums, and one more if the peaks hide the divergence.
template <class T>
__device__ PairSums general_sums(const PairPart<T>& part, double inverse_temperature) {
  GeneralPeaks own;
  part.each(own);
  struct Found {
    float first, second, nan;
  };
  const Found peaks = merged_over_block(Found{own.first, own.second, own.nan}, [](const Found& a, const Found& b) {
    return Found{fmaxf(a.first, b.first), fmaxf(a.second, b.second), fmaxf(a.nan, b.nan)};
  });
  if (peaks.nan > 0.f || peaks.first == INFINITY || peaks.second == INFINITY) return invalid_pair();
  const bool no_p = peaks.first == -INFINITY, no_q = peaks.second == -INFINITY;
  if (no_p && no_q) return empty_pair();
  const Terms::Frame frame{no_p ? peaks.second : peaks.first, no_q ? peaks.first : peaks.second};
  const PairSums sums = general_sums_from(part, inverse_temperature, frame);
  if (no_p || no_q) return without_mass(sums, no_p, no_q);
  if (!hides_divergence(sums)) return sums;
  return general_sums_from(part, inverse_temperature, {frame.reference, equal_reference(sums, inverse_temperature)});
}

}  // namespace egrsd::cuda
