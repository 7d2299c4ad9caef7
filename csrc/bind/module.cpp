// The kernels as a Python module. It takes addresses, sizes and strides, and includes nothing of torch: one source for
// every torch, built without one. megatron_egrsd/vocab_parallel/kernels.py checks the tensors and allocates the results.
#include <pybind11/pybind11.h>

#include "../cpu/kernels.h"
#include "address.h"
#include "divergence.h"
#include "parallel.h"
#ifdef EGRSD_CUDA
#include "cuda_error.h"
#endif

namespace py = pybind11;

namespace egrsd {
namespace {

Logits logits_of(Address data, int dtype, int64_t inner_rows, int64_t outer_stride, int64_t inner_stride, int64_t rows,
                 int64_t columns, int64_t valid, int64_t vocab_start, Address target, Address temperature,
                 double inverse_temperature) {
  return {at<const void>(data), Dtype(dtype), {inner_rows, outer_stride, inner_stride}, rows, columns, valid,
          vocab_start, at<const int64_t>(target), at<const float>(temperature), inverse_temperature};
}

Gradient gradient_of(Address data, int64_t inner_rows, int64_t outer_stride, int64_t inner_stride, Address whole,
                     Address grad_log_prob, Address grad_entropy, Address grad_log_normalizer) {
  return {at<void>(data), {inner_rows, outer_stride, inner_stride}, at<const Statistics>(whole),
          at<const float>(grad_log_prob), at<const float>(grad_entropy), at<const float>(grad_log_normalizer)};
}

void statistics(const Logits& logits, int threads, Address out) {
  by_rows(
      logits.rows, logits.valid, threads, at<Statistics>(out),
      [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, Statistics* result) {
        cpu::statistics(logits, r0, r1, c0, c1, result);
      },
      [](const Statistics& a, const Statistics& b) { return merged(a, b); });
}

void combine(Address parts, int64_t ranks, int64_t rows, Address whole, Address log_prob, Address entropy,
             Address log_normalizer) {
  const Statistics* part = at<const Statistics>(parts);
  for (int64_t i = 0; i < rows; ++i) {
    Statistics s = part[i];
    for (int64_t r = 1; r < ranks; ++r) s = merged(s, part[r * rows + i]);
    const Result values = finish(s);
    at<Statistics>(whole)[i] = s;
    at<float>(log_prob)[i] = float(values.log_prob);
    at<float>(entropy)[i] = float(values.entropy);
    at<float>(log_normalizer)[i] = float(values.log_normalizer);
  }
}

void logits_grad(const Logits& logits, const Gradient& gradient, int threads) {
  parallel_for(logits.rows, threads,
               [&](int64_t first, int64_t last) { cpu::logits_grad(logits, gradient, first, last); });
}

// The memory floors of the benchmark, over the same threads as the kernels.
constexpr int64_t kPage = 4096;

void read_floor(Address memory, int64_t bytes, int threads) {
  parallel_for(bytes / kPage, threads, [&](int64_t first, int64_t last) {
    volatile float sink = cpu::read_floor(at<const char>(memory) + first * kPage, (last - first) * kPage);
    (void)sink;
  });
}

void read_write_floor(Address memory, int64_t bytes, int threads) {
  parallel_for(bytes / kPage, threads, [&](int64_t first, int64_t last) {
    cpu::read_write_floor(at<char>(memory) + first * kPage, (last - first) * kPage);
  });
}

#ifdef EGRSD_CUDA
void cuda_statistics(const Logits& logits, int splits, Address workspace, Address out, Address stream) {
  check(cuda::statistics(logits, splits, at<Statistics>(workspace), at<Statistics>(out), at<void>(stream)));
}

void cuda_combine(Address parts, int64_t ranks, int64_t rows, Address whole, Address log_prob, Address entropy,
                  Address log_normalizer, Address stream) {
  check(cuda::combine(at<const Statistics>(parts), ranks, rows, at<Statistics>(whole), at<float>(log_prob),
                      at<float>(entropy), at<float>(log_normalizer), at<void>(stream)));
}

void cuda_logits_grad(const Logits& logits, const Gradient& gradient, Address stream) {
  check(cuda::logits_grad(logits, gradient, at<void>(stream)));
}

int cuda_splits(int64_t rows, int64_t valid, int device) {
  return cuda::splits_for(rows, valid, cuda::multiprocessors(device));
}
#endif

}  // namespace
}  // namespace egrsd

PYBIND11_MODULE(_kernels, m) {
  using namespace egrsd;
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Logits>(m, "Logits").def(py::init(&logits_of));
  py::class_<Gradient>(m, "Gradient").def(py::init(&gradient_of));
  m.attr("interface") = 1;  // changes with any signature below; kernels.py refuses another
  m.def("statistics", &statistics, release());
  m.def("combine", &combine, release());
  m.def("logits_grad", &logits_grad, release());
  m.def("read_floor", &read_floor, release());
  m.def("read_write_floor", &read_write_floor, release());
  m.def("instruction_set", &cpu::instruction_set);
  bind_divergence(m);
#ifdef EGRSD_CUDA
  m.def("cuda_statistics", &cuda_statistics, release());
  m.def("cuda_combine", &cuda_combine, release());
  m.def("cuda_logits_grad", &cuda_logits_grad, release());
  m.def("cuda_splits", &cuda_splits);
#endif
}
