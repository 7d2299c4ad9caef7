// The threads of a block, and what they put together.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace egrsd::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

inline unsigned blocks_of_threads(int64_t count) { return unsigned((count + kThreads - 1) / kThreads); }

// `x`, a struct of floats, of the lane whose number differs from this one's by the bits of `lane_mask`.
template <class X>
__device__ __forceinline__ X shuffled(const X& x, int lane_mask) {
  constexpr int kFloats = sizeof(X) / sizeof(float);
  float values[kFloats];
  memcpy(values, &x, sizeof(X));
#pragma unroll
  for (int i = 0; i < kFloats; ++i) values[i] = __shfl_xor_sync(~0u, values[i], lane_mask);
  X other;
  memcpy(&other, values, sizeof(X));
  return other;
}

template <class X, class Merge>
__device__ __forceinline__ X merged_over_lanes(X x, int lanes, const Merge& merge) {
#pragma unroll
  for (int mask = lanes / 2; mask; mask >>= 1) x = merge(x, shuffled(x, mask));
  return x;
}

// `x` of all threads of the block, in every one of them; `merge` must not depend on the order of its arguments.
template <class X, class Merge>
__device__ __forceinline__ X merged_over_block(X x, const Merge& merge) {
  __shared__ X warps[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x = merged_over_lanes(x, 32, merge);
  __syncthreads();  // the readers of an earlier call are done
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  return merged_over_lanes(warps[lane % kWarps], kWarps, merge);
}

}  // namespace egrsd::cuda
