// Part of two rows of logits as a block reads it: 16 bytes of each at a time, and the unaligned ends one by one.
#pragma once
#include "../common/divergence.h"
#include "block.h"
#include "ptx.h"
#include "vector16.h"

namespace egrsd::cuda {

constexpr int kPairUnroll = 2;  // 16-byte loads of each tensor in flight per thread

template <class T>
struct PairPart {
  using V = Vector16<T>;
  static constexpr int kWidth = V::kWidth;
  const T *t, *s;
  int64_t head, tail, valid;  // the elements [head, tail) are vectors
  uint32_t first, last;       // of this part's vectors
  bool has_ends;

  // Part `part` of `parts` of a row's vectors; part 0 also has the ends, which are all if the rows differ in alignment.
  __device__ __forceinline__ PairPart(const Pair& pair, int64_t row, uint32_t part, uint32_t parts)
      : t(static_cast<const T*>(pair.first) + pair.first_layout.offset(row)),
        s(static_cast<const T*>(pair.second) + pair.second_layout.offset(row)), valid(pair.valid),
        has_ends(part == 0) {
    const bool same_alignment = ((reinterpret_cast<uintptr_t>(t) ^ reinterpret_cast<uintptr_t>(s)) & 15) == 0;
    const VectorSpan<T> span(t, valid, same_alignment);
    head = span.head;
    tail = span.tail;
    const uint32_t share = (span.vectors + parts - 1) / parts;
    first = min(part * share, span.vectors);
    last = min(first + share, span.vectors);
  }

  __device__ __forceinline__ const uint4* vectors_of(const T* row) const {
    return reinterpret_cast<const uint4*>(row + head);
  }

  // One vector of each row a thread, spread over the part; -inf where there is none.
  __device__ __forceinline__ void sample(float* x, float* y) const {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[e] = y[e] = -INFINITY;
    const uint32_t count = last - first, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t i = count < kThreads ? threadIdx.x : warp * (count / kWarps) + lane;
    if (i < count) {
      V::unpack(load_once(vectors_of(t) + first + i), x);
      V::unpack(load_once(vectors_of(s) + first + i), y);
    } else if (count == 0 && has_ends && threadIdx.x < valid) {
      x[0] = V::widen(t[threadIdx.x]);
      y[0] = V::widen(s[threadIdx.x]);
    }
  }

  // Calls use.template add<K>(K logits of t, K logits of s) until this thread has had its share.
  template <class Use>
  __device__ __forceinline__ void each(Use& use) const {
    const uint4 *a = vectors_of(t), *b = vectors_of(s);
    uint32_t i = first + threadIdx.x;
    auto one_vector = [&](const uint4& u, const uint4& v) {
      float x[kWidth], y[kWidth];
      V::unpack(u, x);
      V::unpack(v, y);
      use.template add<kWidth>(x, y);
    };
    for (; i + (kPairUnroll - 1) * kThreads < last; i += kPairUnroll * kThreads) {
      uint4 u[kPairUnroll], v[kPairUnroll];
#pragma unroll
      for (int k = 0; k < kPairUnroll; ++k) {
        u[k] = load_once(a + i + k * kThreads);
        v[k] = load_once(b + i + k * kThreads);
      }
#pragma unroll
      for (int k = 0; k < kPairUnroll; ++k) one_vector(u[k], v[k]);
    }
    for (; i < last; i += kThreads) one_vector(load_once(a + i), load_once(b + i));
    if (!has_ends) return;
    auto one = [&](int64_t j) {
      const float x = V::widen(t[j]), y = V::widen(s[j]);
      use.template add<1>(&x, &y);
    };
    for (int64_t j = threadIdx.x; j < head; j += kThreads) one(j);
    for (int64_t j = tail + threadIdx.x; j < valid; j += kThreads) one(j);
  }
};

}  // namespace egrsd::cuda
