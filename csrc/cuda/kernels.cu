// Forward: every logit read once, 16 bytes a load, statistics kept online in registers. Backward: one read, one write.
// Plain CUDA runtime: `nvcc -cubin -arch=sm_90 kernels.cu` needs no torch and no GPU (tools/check_cuda.sh).
#include "kernels.h"

#include <cuda_runtime.h>

#include "block.h"
#include "ptx.h"
#include "vector16.h"

namespace egrsd::cuda {
namespace {

constexpr int kUnroll = 4;             // 16-byte loads in flight per thread
constexpr int kVectorsPerThread = 16;  // of one backward block
constexpr float kLowest = -126.f;      // bits; below it 2^y is 0, and y 2^y must not be -inf * 0

// Online statistics of the logits one thread has seen, in bits.
struct Online {
  float reference = -INFINITY, rest = 0.f, weighted = 0.f;

  template <int K>
  __device__ __forceinline__ void add(const float* x, float bits_per_logit) {
    float peak = x[0];
#pragma unroll
    for (int i = 1; i < K; ++i) peak = fmaxf(peak, x[i]);
    const float needed = peak * bits_per_logit;
    if (needed > reference) {  // rare after a thread's first turns
      const float raised = ceilf(needed), shift = reference - raised, scale = exp2_approx(shift);
      weighted = scale > 0.f ? scale * fmaf(shift, rest, weighted) : 0.f;
      rest *= scale;
      reference = raised;
    }
    if (reference == -INFINITY) {  // only -inf so far, or NaN, which the maximum does not show
#pragma unroll
      for (int i = 0; i < K; ++i)
        if (x[i] != x[i]) rest = NAN;
      return;
    }
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const float y = max_keep_nan(fmaf(x[i], bits_per_logit, -reference), kLowest), e = exp2_approx(y);
      rest += e;
      weighted = fmaf(y, e, weighted);
    }
  }

  __device__ __forceinline__ Statistics statistics() const {
    return {reference, rest, float(kLn2) * weighted, -INFINITY};
  }
};

__device__ __forceinline__ Statistics merged_over_warp(const Statistics& s) {
  return merged_over_lanes(s, 32, [](const Statistics& a, const Statistics& b) { return merged(a, b); });
}

// The vectors of a row of logits, and the place of the target: it is compared once a vector, not once an element.
template <class T>
struct RowGeometry : VectorSpan<T> {
  uint32_t target_vector;  // ~0 if the target is in no vector
  int target_lane;

  __device__ __forceinline__ RowGeometry(const T* p, int64_t valid, int64_t target, bool vectorised = true)
      : VectorSpan<T>(p, valid, vectorised) {
    constexpr int kWidth = Vector16<T>::kWidth;
    const int64_t in_body = target - this->head;
    target_vector = in_body >= 0 && target < this->tail ? uint32_t(in_body / kWidth) : ~0u;
    target_lane = int(in_body % kWidth);
  }
};

// Grid (rows, splits): block (r, k) takes part k of row r's vectors; part 0 also the unaligned ends and the target.
template <class T>
__global__ void __launch_bounds__(kThreads)
statistics_kernel(const Logits logits, Statistics* __restrict__ out) {
  using V = Vector16<T>;
  const int64_t row = blockIdx.x, target_id = logits.target_of(row), target = target_id - logits.vocab_start;
  const int64_t valid = logits.valid;
  const uint32_t part = blockIdx.y, parts = gridDim.y;
  Statistics* result = out + row * parts + part;
  if (target_id == kIgnoreIndex) {
    if (threadIdx.x == 0) *result = ignored_statistics();
    return;
  }
  const T* __restrict__ p = static_cast<const T*>(logits.data) + logits.layout.offset(row);
  const float bits_per_logit = float(kLog2e * logits.inverse_temperature_of(row));
  const RowGeometry<T> g(p, valid, target);
  const uint32_t share = (g.vectors + parts - 1) / parts;
  const uint32_t last = min((part + 1) * share, g.vectors);
  const uint4* body = reinterpret_cast<const uint4*>(p + g.head);
  Online online;
  auto unpack = [&](const uint4& v, uint32_t index, float* x) {
    V::unpack(v, x);
    if (index == g.target_vector) {
#pragma unroll
      for (int e = 0; e < V::kWidth; ++e)
        if (e == g.target_lane) x[e] = -INFINITY;
    }
  };
  uint32_t i = part * share + threadIdx.x;
  for (; i + (kUnroll - 1) * kThreads < last; i += kUnroll * kThreads) {
    uint4 v[kUnroll];
    float x[kUnroll * V::kWidth];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = load_once(body + i + u * kThreads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) unpack(v[u], i + u * kThreads, x + u * V::kWidth);
    online.add<kUnroll * V::kWidth>(x, bits_per_logit);
  }
  for (; i < last; i += kThreads) {
    float x[V::kWidth];
    unpack(load_once(body + i), i, x);
    online.add<V::kWidth>(x, bits_per_logit);
  }
  if (part == 0) {
    auto add_scalar = [&](int64_t j) {
      const float x = V::widen(p[j]);
      if (j != target) online.add<1>(&x, bits_per_logit);
    };
    for (int64_t j = threadIdx.x; j < g.head; j += kThreads) add_scalar(j);
    for (int64_t j = g.tail + threadIdx.x; j < valid; j += kThreads) add_scalar(j);
  }
  Statistics s = merged_over_warp(online.statistics());
  __shared__ Statistics warps[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) warps[warp] = s;
  __syncthreads();
  if (warp != 0) return;
  s = merged_over_warp(lane < kWarps ? warps[lane] : empty_statistics());
  if (lane != 0) return;
  if (part == 0 && target >= 0 && target < valid) {
    const float x = V::widen(p[target]), needed = x * bits_per_logit;
    if (needed > s.reference + 1.f) s = moved(s, ceilf(needed));
    if (x == -INFINITY)
      s.target = -INFINITY;
    else  // one rounding of x bits - c, in fp64 because it runs once a row
      s.target = float(kLn2 * (double(x) * double(bits_per_logit) - double(s.reference)));
  }
  *result = s;
}

// One thread per token: merge `parts` statistics that are part_stride apart, and write the results if requested.
__global__ void combine_kernel(const Statistics* __restrict__ in, int64_t rows, int64_t parts, int64_t row_stride,
                               int64_t part_stride, Statistics* __restrict__ whole, float* __restrict__ log_prob,
                               float* __restrict__ entropy, float* __restrict__ log_normalizer) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  Statistics s = in[row * row_stride];
  for (int64_t k = 1; k < parts; ++k) s = merged(s, in[row * row_stride + k * part_stride]);
  whole[row] = s;
  if (log_prob) {
    const Result r = finish(s);
    log_prob[row] = float(r.log_prob);
    entropy[row] = float(r.entropy);
    log_normalizer[row] = float(r.log_normalizer);
  }
}

// Grid (rows, chunks of a row). The gradient may overwrite the logits: every thread writes only what it has read.
template <class T, bool kEntropy>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const Logits logits, const Gradient out) {
  using V = Vector16<T>;
  const int64_t row = blockIdx.x, target_id = logits.target_of(row), target = target_id - logits.vocab_start;
  const int64_t columns = logits.columns, valid = logits.valid;
  const bool ignored = target_id == kIgnoreIndex;
  const T* p = static_cast<const T*>(logits.data) + logits.layout.offset(row);
  T* q = static_cast<T*>(out.data) + out.layout.offset(row);
  const double inverse_temperature = logits.inverse_temperature_of(row);
  const float bits_per_logit = float(kLog2e * inverse_temperature);
  __shared__ GradientCoefficients shared_coefficients;
  if (threadIdx.x == 0) shared_coefficients = out.coefficients(row, inverse_temperature);
  __syncthreads();
  const GradientCoefficients k = shared_coefficients;
  const float reference = out.whole[row].reference;
  auto gradient = [&](float x, bool at_target) {
    const float y = max_keep_nan(fmaf(x, bits_per_logit, -reference), kLowest), e = exp2_approx(y);
    const float value = e * (kEntropy ? fmaf(k.slope, y, k.constant) : k.constant);
    return ignored ? 0.f : at_target ? k.at_target : value;
  };
  auto one = [&](int64_t j) { q[j] = V::narrow(j < valid ? gradient(V::widen(p[j]), j == target) : 0.f); };

  const bool same_alignment = ((reinterpret_cast<uintptr_t>(p) ^ reinterpret_cast<uintptr_t>(q)) & 15) == 0;
  const RowGeometry<T> g(p, valid, target, same_alignment);
  auto one_vector = [&](uint32_t i, const uint4& v) {
    float x[V::kWidth];
    V::unpack(v, x);
#pragma unroll
    for (int e = 0; e < V::kWidth; ++e) x[e] = gradient(x[e], i == g.target_vector && e == g.target_lane);
    store_streaming(q + g.head + int64_t(i) * V::kWidth, V::pack(x));
  };
  constexpr uint32_t kVectorsPerBlock = kThreads * kVectorsPerThread;
  const uint32_t last = min((blockIdx.y + 1) * kVectorsPerBlock, g.vectors);
  uint32_t i = blockIdx.y * kVectorsPerBlock + threadIdx.x;
  const T* body = p + g.head;
  for (; i + (kUnroll - 1) * kThreads < last; i += kUnroll * kThreads) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = load_then_overwritten(body + int64_t(i + u * kThreads) * V::kWidth);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) one_vector(i + u * kThreads, v[u]);
  }
  for (; i < last; i += kThreads) one_vector(i, load_then_overwritten(body + int64_t(i) * V::kWidth));
  // The unaligned ends and the padded columns; the whole row if logits and gradient differ in alignment.
  const int64_t first_thread = int64_t(blockIdx.y) * kThreads + threadIdx.x, step = int64_t(gridDim.y) * kThreads;
  for (int64_t j = first_thread; j < g.head; j += step) one(j);
  for (int64_t j = g.tail + first_thread; j < columns; j += step) one(j);
}

template <class T>
int statistics_of(const Logits& l, int splits, Statistics* workspace, Statistics* out, cudaStream_t stream) {
  const dim3 grid(unsigned(l.rows), unsigned(splits));
  statistics_kernel<T><<<grid, kThreads, 0, stream>>>(l, splits > 1 ? workspace : out);
  if (splits > 1)
    combine_kernel<<<blocks_of_threads(l.rows), kThreads, 0, stream>>>(
        workspace, l.rows, splits, splits, 1, out, nullptr, nullptr, nullptr);
  return int(cudaGetLastError());
}

template <class T, bool kEntropy>
int gradient_of(const Logits& l, const Gradient& gradient, cudaStream_t stream) {
  const int64_t per_block = int64_t(kThreads) * kVectorsPerThread * Vector16<T>::kWidth;
  const dim3 grid(unsigned(l.rows), unsigned((l.columns + per_block - 1) / per_block));
  gradient_kernel<T, kEntropy><<<grid, kThreads, 0, stream>>>(l, gradient);
  return int(cudaGetLastError());
}

}  // namespace

int splits_for(int64_t rows, int64_t valid, int multiprocessors) {
  const int64_t blocks = int64_t(multiprocessors) * 8;  // resident blocks of 256 threads
  if (rows >= blocks || rows == 0) return 1;
  const int64_t wanted = (blocks + rows - 1) / rows, most = valid / 8192;
  return int(wanted < most ? wanted : most > 1 ? most : 1);
}

int multiprocessors(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 1;
}

int statistics(const Logits& l, int splits, Statistics* workspace, Statistics* out, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return with_element(
      l, [&](auto element) { return statistics_of<decltype(element)>(l, splits, workspace, out, s); });
}

int combine(const Statistics* parts, int64_t ranks, int64_t rows, Statistics* whole, float* log_prob, float* entropy,
            float* log_normalizer, void* stream) {
  if (rows == 0) return 0;
  combine_kernel<<<blocks_of_threads(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      parts, rows, ranks, 1, rows, whole, log_prob, entropy, log_normalizer);
  return int(cudaGetLastError());
}

int logits_grad(const Logits& l, const Gradient& gradient, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return with_element(l, [&](auto element) {
    using T = decltype(element);
    return gradient.grad_entropy ? gradient_of<T, true>(l, gradient, s) : gradient_of<T, false>(l, gradient, s);
  });
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

}  // namespace egrsd::cuda
