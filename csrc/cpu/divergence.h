// The CPU kernels of two tensors of logits, as kernels.h has those of one.
#pragma once
#include "../common/divergence.h"

namespace egrsd::cpu {

// Statistics of columns [column_first, column_last) of rows [row_first, row_last) into out[0 .. row_last - row_first),
// the first tensor's distribution being p. `other_entropy`: the second tensor's entropy is wanted too.
void pair_statistics(const Pair&, bool other_entropy, int64_t row_first, int64_t row_last, int64_t column_first,
                     int64_t column_last, PairStatistics* out);

// Sums of the entries of the same ranges, the first tensor being the teacher's.
void entry_sums(const Pair&, const Entries&, int64_t row_first, int64_t row_last, int64_t column_first,
                int64_t column_last, EntrySums* out);

// Gradient with respect to the second tensor, of rows [row_first, row_last): zeros in padded columns.
void pair_gradient(const Pair&, const Entries&, const PairGradient&, int64_t row_first, int64_t row_last);

}  // namespace egrsd::cpu
