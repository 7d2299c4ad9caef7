// CUDA on one CPU thread: as much of the language and its runtime as csrc/cuda/kernels.cu uses, for tests without a GPU.
//
// The threads of a block are fibers. One runs until it meets a barrier or a shuffle, then another one, in random order:
// what only holds in one order, a missing barrier, shows. A barrier that some threads never meet is an error.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 4;
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t error) { return error ? "error" : "success"; }

inline dim3 gridDim, blockIdx, threadIdx;

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10;
enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  State state;
  std::vector<char> stack = std::vector<char>(kStack);
};

inline std::vector<Fiber> fibers;
inline std::vector<uint32_t> exchanged;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::mt19937 random_order(0);
inline cudaError_t last_error = cudaSuccess;

inline void enter() {
  body();
  fibers[threadIdx.x].state = State::kDone;
}  // its context ends in the scheduler's

inline void wait(State at) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.state = at;
  swapcontext(&fiber.context, &scheduler);
}

// Those in [first, last) that wait at this barrier go on once all that still run do.
inline bool release(State at, size_t first, size_t last) {
  size_t waiting = 0, running = 0;
  for (size_t i = first; i < last; ++i) {
    waiting += fibers[i].state == at;
    running += fibers[i].state != State::kDone;
  }
  if (waiting == 0 || waiting != running) return false;
  for (size_t i = first; i < last; ++i)
    if (fibers[i].state == at) fibers[i].state = State::kReady;
  return true;
}

inline bool run_block(unsigned threads) {
  fibers.resize(threads);
  exchanged.resize(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::kReady;
  }
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (;;) {
    std::shuffle(order.begin(), order.end(), random_order);
    for (unsigned i : order)
      if (fibers[i].state == State::kReady) {
        threadIdx.x = i;
        swapcontext(&scheduler, &fibers[i].context);
      }
    bool released = release(State::kAtBlockBarrier, 0, threads);
    for (unsigned first = 0; first < threads; first += 32)
      released |= release(State::kAtWarpBarrier, first, std::min(first + 32, threads));
    if (!released)
      return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::kDone; });
  }
}

// kernel<<<grid, threads>>>(arguments...), as tests/cuda_on_cpu/__init__.py rewrites it.
template <class... P>
auto launch(void (*kernel)(P...), dim3 grid, unsigned threads) {
  return [=](P... arguments) {
    body = [=] { kernel(arguments...); };
    gridDim = grid;
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y);
        if (!run_block(threads)) last_error = cudaErrorLaunchFailure;
      }
  };
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::kAtBlockBarrier); }

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  const unsigned self = threadIdx.x;
  cuda_on_cpu::exchanged[self] = __float_as_uint(value);
  cuda_on_cpu::wait(cuda_on_cpu::State::kAtWarpBarrier);
  const float other = __uint_as_float(cuda_on_cpu::exchanged[self ^ lane_mask]);
  cuda_on_cpu::wait(cuda_on_cpu::State::kAtWarpBarrier);
  return other;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error;
  cuda_on_cpu::last_error = cudaSuccess;
  return error;
}
