// A parallel loop on the threads of torch's own OpenMP runtime, without linking one.
//
// An OpenMP runtime linked here would be a second pool of threads: after each of its loops, torch's threads spin for
// about a millisecond on the cores that ours need. libgomp, and LLVM's and Intel's libomp, export GOMP_parallel, and
// torch loads its runtime into the global scope. If there is none, the loop runs on threads of its own.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace egrsd {

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*threads)();
};

inline const OpenMp* openmp() {
  static const OpenMp found{reinterpret_cast<decltype(OpenMp::parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
                            reinterpret_cast<decltype(OpenMp::thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
                            reinterpret_cast<decltype(OpenMp::threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))};
  return found.parallel && found.thread && found.threads ? &found : nullptr;
}

// Calls body(first, last) on disjoint ranges that cover [0, count), at most `threads` of them at a time.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  threads = int(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    if (count > 0) body(int64_t(0), count);
    return;
  }
  auto share = [&](int64_t index, int64_t of) {
    const int64_t width = (count + of - 1) / of, first = index * width;
    if (first < count) body(first, std::min(first + width, count));
  };
  if (const OpenMp* omp = openmp()) {
    auto region = [&] { share(omp->thread(), omp->threads()); };  // the runtime may give fewer threads than asked for
    omp->parallel([](void* f) { (*static_cast<decltype(region)*>(f))(); }, &region, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(share, i, threads);
  share(0, threads);
  for (std::thread& other : others) other.join();
}

// Calls sum(row, row + rows of the piece, first column, last column, result) over the threads: some of the rows each,
// or if there are too few rows, parts of rows, whose results `add` puts together.
template <class Result, class Sum, class Add>
void by_rows(int64_t rows, int64_t valid, int threads, Result* out, const Sum& sum, const Add& add) {
  constexpr int64_t kSmallestPart = 4096;
  const int64_t wanted = rows >= 4 * threads || rows == 0 ? 1 : (4 * threads + rows - 1) / rows;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, valid / kSmallestPart));
  if (parts == 1) {
    parallel_for(rows, threads, [&](int64_t first, int64_t last) { sum(first, last, 0, valid, out + first); });
    return;
  }
  const int64_t width = (valid + parts - 1) / parts;
  std::vector<Result> pieces(rows * parts);
  parallel_for(rows * parts, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / parts, column = i % parts * width;
      sum(row, row + 1, column, std::min(column + width, valid), &pieces[i]);
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    out[row] = pieces[row * parts];
    for (int64_t k = 1; k < parts; ++k) out[row] = add(out[row], pieces[row * parts + k]);
  }
}

}  // namespace egrsd
