// The kernels of two tensors of logits, called with addresses as those of module.cpp are.
#include "divergence.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../cpu/divergence.h"
#include "address.h"
#include "parallel.h"
#ifdef EGRSD_CUDA
#include "../cuda/divergence.h"
#include "cuda_error.h"
#endif

namespace py = pybind11;

namespace egrsd {
namespace {

using Layout = std::array<int64_t, 3>;  // inner rows, outer stride, inner stride

RowLayout row_layout(const Layout& x) { return {x[0], x[1], x[2]}; }

Pair pair_of(Address first, Address second, int dtype, const Layout& first_layout, const Layout& second_layout,
             int64_t rows, int64_t columns, int64_t valid, double inverse_temperature) {
  return {at<const void>(first), at<const void>(second), Dtype(dtype), row_layout(first_layout),
          row_layout(second_layout), rows, columns, valid, inverse_temperature};
}

Entries entries_of(Address scale, int kind, float limit, float beta) {
  return {at<const PairScale>(scale), Kind(kind), limit, beta};
}

PairGradient gradient_of(Address data, const Layout& layout, Address sums, Address grad_value) {
  return {at<void>(data), row_layout(layout), at<const EntrySums>(sums),
          at<const float>(grad_value)};
}

void pair_statistics(const Pair& pair, bool other_entropy, int threads, Address out) {
  by_rows(
      pair.rows, pair.valid, threads, at<PairStatistics>(out),
      [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, PairStatistics* result) {
        cpu::pair_statistics(pair, other_entropy, r0, r1, c0, c1, result);
      },
      [&](const PairStatistics& a, const PairStatistics& b) {
        return narrowed(merged(widened(a), widened(b), pair.inverse_temperature));
      });
}

void merge_pairs(Address parts, int64_t ranks, int64_t rows, double inverse_temperature, Address out) {
  const PairStatistics* part = at<const PairStatistics>(parts);
  for (int64_t i = 0; i < rows; ++i)
    at<PairStatistics>(out)[i] = narrowed(merged_over_parts(part + i, ranks, rows, inverse_temperature));
}

void combine_pairs(Address parts, int64_t ranks, int64_t rows, double inverse_temperature, bool student_first,
                   Address scale, Address divergence, Address teacher_entropy) {
  const PairStatistics* part = at<const PairStatistics>(parts);
  for (int64_t i = 0; i < rows; ++i) {
    const PairSums sums = merged_over_parts(part + i, ranks, rows, inverse_temperature);
    const PairValues values = pair_values(sums, inverse_temperature, student_first);
    at<PairScale>(scale)[i] = values.scale;
    at<float>(divergence)[i] = values.divergence;
    at<float>(teacher_entropy)[i] = values.teacher_entropy;
  }
}

void entry_sums(const Pair& pair, const Entries& entries, int threads, Address out) {
  by_rows(
      pair.rows, pair.valid, threads, at<EntrySums>(out),
      [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, EntrySums* result) {
        cpu::entry_sums(pair, entries, r0, r1, c0, c1, result);
      },
      [](const EntrySums& a, const EntrySums& b) { return merged(a, b); });
}

void pair_gradient(const Pair& pair, const Entries& entries, const PairGradient& gradient, int threads) {
  parallel_for(pair.rows, threads,
               [&](int64_t first, int64_t last) { cpu::pair_gradient(pair, entries, gradient, first, last); });
}

#ifdef EGRSD_CUDA
void cuda_pair_statistics(const Pair& pair, bool other_entropy, int splits, Address workspace, Address out,
                          Address stream) {
  check(cuda::pair_statistics(pair, other_entropy, splits, at<PairStatistics>(workspace), at<PairStatistics>(out),
                              at<void>(stream)));
}

void cuda_merge_pairs(Address parts, int64_t ranks, int64_t rows, double inverse_temperature, Address out,
                      Address stream) {
  check(cuda::merge_pairs(at<const PairStatistics>(parts), ranks, rows, inverse_temperature, at<PairStatistics>(out),
                          at<void>(stream)));
}

void cuda_combine_pairs(Address parts, int64_t ranks, int64_t rows, double inverse_temperature, bool student_first,
                        Address scale, Address divergence, Address teacher_entropy, Address stream) {
  check(cuda::combine_pairs(at<const PairStatistics>(parts), ranks, rows, inverse_temperature, student_first,
                            at<PairScale>(scale), at<float>(divergence), at<float>(teacher_entropy), at<void>(stream)));
}

void cuda_entry_sums(const Pair& pair, const Entries& entries, int splits, Address workspace, Address out,
                     Address stream) {
  check(cuda::entry_sums(pair, entries, splits, at<EntrySums>(workspace), at<EntrySums>(out), at<void>(stream)));
}

void cuda_pair_gradient(const Pair& pair, const Entries& entries, const PairGradient& gradient, Address stream) {
  check(cuda::pair_gradient(pair, entries, gradient, at<void>(stream)));
}
#endif

}  // namespace

void bind_divergence(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Pair>(m, "Pair").def(py::init(&pair_of));
  py::class_<Entries>(m, "Entries").def(py::init(&entries_of));
  py::class_<PairGradient>(m, "PairGradient").def(py::init(&gradient_of));
  m.def("pair_statistics", &pair_statistics, release());
  m.def("combine_pairs", &combine_pairs, release());
  m.def("merge_pairs", &merge_pairs, release());
  m.def("entry_sums", &entry_sums, release());
  m.def("pair_gradient", &pair_gradient, release());
#ifdef EGRSD_CUDA
  m.def("cuda_pair_statistics", &cuda_pair_statistics, release());
  m.def("cuda_combine_pairs", &cuda_combine_pairs, release());
  m.def("cuda_merge_pairs", &cuda_merge_pairs, release());
  m.def("cuda_entry_sums", &cuda_entry_sums, release());
  m.def("cuda_pair_gradient", &cuda_pair_gradient, release());
#endif
}

}  // namespace egrsd
