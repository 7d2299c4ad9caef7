// Divergences of two tensors of logits. The first reading reads both once; a second one, if any, sums or writes what
// needs the normalised probabilities.
#include "divergence.h"

#include <cuda_runtime.h>

#include "lane.h"
#include "pair_sums.h"

namespace egrsd::cuda {
namespace {

constexpr int kPairVectors = 8;  // of one block of the gradient

// Grid (rows, splits). A part that near_sums cannot sum is marked for general_kernel.
template <class T, bool kOtherEntropy>
__global__ void __launch_bounds__(kThreads)
near_kernel(const Pair pair, const Unit unit, PairStatistics* __restrict__ out) {
  const PairPart<T> part(pair, blockIdx.x, blockIdx.y, gridDim.y);
  const NearResult result = near_sums<T, kOtherEntropy>(part, unit.bits);
  if (threadIdx.x == 0)
    out[int64_t(blockIdx.x) * gridDim.y + blockIdx.y] = result.found ? result.statistics(unit) : marked_statistics();
}

// Sums the parts that near_kernel has left, rows of any kind.
template <class T>
__global__ void __launch_bounds__(kThreads) general_kernel(const Pair pair, PairStatistics* __restrict__ out) {
  PairStatistics* const result = out + int64_t(blockIdx.x) * gridDim.y + blockIdx.y;
  if (!is_marked(*result)) return;
  const PairSums sums = general_sums(PairPart<T>(pair, blockIdx.x, blockIdx.y, gridDim.y), pair.inverse_temperature);
  __syncthreads();  // all have read the mark
  if (threadIdx.x == 0) *result = narrowed(sums);
}

// One thread a token: merge `parts` statistics that are part_stride apart.
__global__ void merge_kernel(const PairStatistics* __restrict__ in, int64_t rows, int64_t parts, int64_t row_stride,
                             int64_t part_stride, double inverse_temperature, PairStatistics* __restrict__ out) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  out[row] = narrowed(merged_over_parts(in + row * row_stride, parts, part_stride, inverse_temperature));
}

__global__ void combine_pairs_kernel(const PairStatistics* __restrict__ in, int64_t rows, int64_t parts,
                                     double inverse_temperature, bool student_first, PairScale* __restrict__ scale,
                                     float* __restrict__ divergence, float* __restrict__ teacher_entropy) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  const PairSums sums = merged_over_parts(in + row, parts, rows, inverse_temperature);
  const PairValues values = pair_values(sums, inverse_temperature, student_first);
  scale[row] = values.scale;
  divergence[row] = values.divergence;
  teacher_entropy[row] = values.teacher_entropy;
}

template <Kind kKind>
struct EntryAdder {
  Terms::Normalised normalised;
  float limit, beta;
  Terms::EntryTotals sums;

  template <int K>
  __device__ __forceinline__ void add(const float* t, const float* s) {
#pragma unroll
    for (int i = 0; i < K; ++i)
      Terms::accumulate_entry<kKind>(normalised(t[i], s[i]), limit, beta, 1.f - beta, sums);
  }
};

// Grid (rows, splits).
template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads)
entries_kernel(const Pair pair, const Entries entries, EntrySums* __restrict__ out) {
  const PairPart<T> part(pair, blockIdx.x, blockIdx.y, gridDim.y);
  EntryAdder<kKind> adder{Terms::Normalised(entries.scale[blockIdx.x], float(kLog2e * pair.inverse_temperature)),
                          entries.limit, entries.beta, {0.f, 0.f, 0.f}};
  part.each(adder);
  const EntrySums own{adder.sums.value, adder.sums.mass, adder.sums.slope};
  const EntrySums whole = merged_over_block(own, [](const EntrySums& a, const EntrySums& b) { return merged(a, b); });
  if (threadIdx.x == 0) out[int64_t(blockIdx.x) * gridDim.y + blockIdx.y] = whole;
}

__global__ void add_entries_kernel(const EntrySums* __restrict__ in, int64_t rows, int64_t parts,
                                   EntrySums* __restrict__ out) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  EntrySums sums = in[row * parts];
  for (int64_t k = 1; k < parts; ++k) sums = merged(sums, in[row * parts + k]);
  out[row] = sums;
}

// Grid (rows, chunks of a row). The gradient may overwrite either tensor: every thread writes only what it has read.
template <class T, Kind kKind, bool kClip>
__global__ void __launch_bounds__(kThreads)
pair_gradient_kernel(const Pair pair, const Entries entries, const PairGradient out) {
  using V = Vector16<T>;
  const int64_t row = blockIdx.x, valid = pair.valid;
  const T* t = static_cast<const T*>(pair.first) + pair.first_layout.offset(row);
  const T* s = static_cast<const T*>(pair.second) + pair.second_layout.offset(row);
  T* q = static_cast<T*>(out.data) + out.layout.offset(row);
  const typename Terms::EntryGradients<kKind, kClip> gradient(
      entries, entry_gradient(kKind, out.sums[row], entries.beta), row, float(kLog2e * pair.inverse_temperature),
      float(out.grad_value[row] * pair.inverse_temperature));
  auto one = [&](int64_t j) { q[j] = V::narrow(j < valid ? gradient(V::widen(t[j]), V::widen(s[j])) : 0.f); };

  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool same_alignment = (((address(t) ^ address(s)) | (address(s) ^ address(q))) & 15) == 0;
  const VectorSpan<T> span(s, valid, same_alignment);
  const int64_t head = span.head, tail = span.tail;
  auto one_vector = [&](uint32_t i, const uint4& u, const uint4& v) {
    float x[V::kWidth], y[V::kWidth];
    V::unpack(u, x);
    V::unpack(v, y);
#pragma unroll
    for (int e = 0; e < V::kWidth; ++e) y[e] = gradient(x[e], y[e]);
    store_streaming(q + head + int64_t(i) * V::kWidth, V::pack(y));
  };
  auto load = [&](const T* p, uint32_t i) { return load_then_overwritten(p + head + int64_t(i) * V::kWidth); };
  constexpr uint32_t kVectorsPerBlock = kThreads * kPairVectors;
  const uint32_t last = min((blockIdx.y + 1) * kVectorsPerBlock, span.vectors);
  uint32_t i = blockIdx.y * kVectorsPerBlock + threadIdx.x;
  for (; i + (kPairUnroll - 1) * kThreads < last; i += kPairUnroll * kThreads) {
    uint4 u[kPairUnroll], v[kPairUnroll];
#pragma unroll
    for (int k = 0; k < kPairUnroll; ++k) {
      u[k] = load(t, i + k * kThreads);
      v[k] = load(s, i + k * kThreads);
    }
#pragma unroll
    for (int k = 0; k < kPairUnroll; ++k) one_vector(i + k * kThreads, u[k], v[k]);
  }
  for (; i < last; i += kThreads) one_vector(i, load(t, i), load(s, i));
  // The unaligned ends and the padded columns; the whole row if the tensors differ in alignment.
  const int64_t first_thread = int64_t(blockIdx.y) * kThreads + threadIdx.x, step = int64_t(gridDim.y) * kThreads;
  for (int64_t j = first_thread; j < head; j += step) one(j);
  for (int64_t j = tail + first_thread; j < pair.columns; j += step) one(j);
}

template <class T, bool kOtherEntropy>
int statistics_of(const Pair& pair, int splits, PairStatistics* workspace, PairStatistics* out, cudaStream_t stream) {
  const dim3 grid(unsigned(pair.rows), unsigned(splits));
  PairStatistics* const parts = splits > 1 ? workspace : out;
  const float bits = float(kLog2e * pair.inverse_temperature);
  near_kernel<T, kOtherEntropy><<<grid, kThreads, 0, stream>>>(pair, Unit{bits, 1 / double(bits)}, parts);
  general_kernel<T><<<grid, kThreads, 0, stream>>>(pair, parts);
  if (splits > 1)
    merge_kernel<<<blocks_of_threads(pair.rows), kThreads, 0, stream>>>(parts, pair.rows, splits, splits, 1,
                                                                        pair.inverse_temperature, out);
  return int(cudaGetLastError());
}

template <class T, Kind kKind>
int entry_sums_of(const Pair& pair, const Entries& entries, int splits, EntrySums* workspace, EntrySums* out,
                  cudaStream_t stream) {
  const dim3 grid(unsigned(pair.rows), unsigned(splits));
  entries_kernel<T, kKind><<<grid, kThreads, 0, stream>>>(pair, entries, splits > 1 ? workspace : out);
  if (splits > 1)
    add_entries_kernel<<<blocks_of_threads(pair.rows), kThreads, 0, stream>>>(workspace, pair.rows, splits, out);
  return int(cudaGetLastError());
}

template <class T, Kind kKind, bool kClip>
int gradient_of(const Pair& pair, const Entries& entries, const PairGradient& gradient, cudaStream_t stream) {
  const int64_t per_block = int64_t(kThreads) * kPairVectors * Vector16<T>::kWidth;
  const dim3 grid(unsigned(pair.rows), unsigned((pair.columns + per_block - 1) / per_block));
  pair_gradient_kernel<T, kKind, kClip><<<grid, kThreads, 0, stream>>>(pair, entries, gradient);
  return int(cudaGetLastError());
}

template <Kind kKind>
struct KindConstant {
  static constexpr Kind value = kKind;
};

// launch(an element, a constant of the kind).
template <class Launch>
int with_element_and_kind(const Pair& pair, Kind kind, const Launch& launch) {
  return with_element(pair, [&](auto element) {
    switch (kind) {
      case Kind::kForwardKl: return launch(element, KindConstant<Kind::kForwardKl>());
      case Kind::kReverseKl: return launch(element, KindConstant<Kind::kReverseKl>());
      case Kind::kJsd: return launch(element, KindConstant<Kind::kJsd>());
    }
    return int(cudaErrorInvalidValue);
  });
}

}  // namespace

int pair_statistics(const Pair& pair, bool other_entropy, int splits, PairStatistics* workspace, PairStatistics* out,
                    void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return with_element(pair, [&](auto element) {
    using T = decltype(element);
    return other_entropy ? statistics_of<T, true>(pair, splits, workspace, out, s)
                         : statistics_of<T, false>(pair, splits, workspace, out, s);
  });
}

int merge_pairs(const PairStatistics* parts, int64_t ranks, int64_t rows, double inverse_temperature,
                PairStatistics* out, void* stream) {
  if (rows == 0) return 0;
  merge_kernel<<<blocks_of_threads(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      parts, rows, ranks, 1, rows, inverse_temperature, out);
  return int(cudaGetLastError());
}

int combine_pairs(const PairStatistics* parts, int64_t ranks, int64_t rows, double inverse_temperature,
                  bool student_first, PairScale* scale, float* divergence, float* teacher_entropy, void* stream) {
  if (rows == 0) return 0;
  combine_pairs_kernel<<<blocks_of_threads(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      parts, rows, ranks, inverse_temperature, student_first, scale, divergence, teacher_entropy);
  return int(cudaGetLastError());
}

int entry_sums(const Pair& pair, const Entries& entries, int splits, EntrySums* workspace, EntrySums* out,
               void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return with_element_and_kind(pair, entries.kind, [&](auto element, auto kind) {
    return entry_sums_of<decltype(element), decltype(kind)::value>(pair, entries, splits, workspace, out, s);
  });
}

int pair_gradient(const Pair& pair, const Entries& entries, const PairGradient& gradient, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return with_element_and_kind(pair, entries.kind, [&](auto element, auto kind) {
    using T = decltype(element);
    constexpr Kind kKind = decltype(kind)::value;
    return entries.limit == INFINITY ? gradient_of<T, kKind, false>(pair, entries, gradient, s)
                                     : gradient_of<T, kKind, true>(pair, entries, gradient, s);
  });
}

}  // namespace egrsd::cuda
