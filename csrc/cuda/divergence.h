// The CUDA kernels of two tensors of logits, as kernels.h has those of one.
#pragma once
#include "../common/divergence.h"

namespace egrsd::cuda {

// The workspace holds [rows, splits] results where splits (splits_for) is above 1. Each returns a cudaError_t.
int pair_statistics(const Pair&, bool other_entropy, int splits, PairStatistics* workspace, PairStatistics* out,
                    void* stream);
int merge_pairs(const PairStatistics* parts, int64_t ranks, int64_t rows, double inverse_temperature,
                PairStatistics* out, void* stream);
int combine_pairs(const PairStatistics* parts, int64_t ranks, int64_t rows, double inverse_temperature,
                  bool student_first, PairScale* scale, float* divergence, float* teacher_entropy, void* stream);
int entry_sums(const Pair&, const Entries&, int splits, EntrySums* workspace, EntrySums* out, void* stream);
int pair_gradient(const Pair&, const Entries&, const PairGradient&, void* stream);

}  // namespace egrsd::cuda
