// The entry points of the kernels of two tensors for ctypes, as entry.cpp has those of one.
#include "divergence.cpp"

using namespace egrsd;

extern "C" {

int pair_statistics(const Pair* pair, bool other_entropy, int splits, PairStatistics* workspace, PairStatistics* out) {
  return cuda::pair_statistics(*pair, other_entropy, splits, workspace, out, nullptr);
}
int merge_pairs(const PairStatistics* parts, int64_t ranks, int64_t rows, double inverse_temperature,
                PairStatistics* out) {
  return cuda::merge_pairs(parts, ranks, rows, inverse_temperature, out, nullptr);
}
int combine_pairs(const PairStatistics* parts, int64_t ranks, int64_t rows, double inverse_temperature,
                  bool student_first, PairScale* scale, float* divergence, float* teacher_entropy) {
  return cuda::combine_pairs(parts, ranks, rows, inverse_temperature, student_first, scale, divergence,
                             teacher_entropy, nullptr);
}
int entry_sums(const Pair* pair, const Entries* entries, int splits, EntrySums* workspace, EntrySums* out) {
  return cuda::entry_sums(*pair, *entries, splits, workspace, out, nullptr);
}
int pair_gradient(const Pair* pair, const Entries* entries, const PairGradient* gradient) {
  return cuda::pair_gradient(*pair, *entries, *gradient, nullptr);
}

}
