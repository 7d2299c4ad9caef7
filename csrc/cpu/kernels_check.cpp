// A stand-alone test of the CPU core for the sanitizers (tools/check_sanitizers.sh): every row lives in a heap block of
// exactly its size, so that a read or write one element too far is seen. Values are checked against long double.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "scalar.h"

using namespace egrsd;
using namespace egrsd::cpu;

namespace {

int failures = 0;

void expect(bool ok, const char* what, int64_t valid, double error) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: %s, %lld columns, error %g\n", instruction_set(), what, static_cast<long long>(valid), error);
}

template <class T>
void check(Dtype dtype, int64_t columns, int64_t valid, int64_t vocab_start, int kind, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const std::unique_ptr<T[]> row(new T[columns]), gradient(new T[columns]);
  for (int64_t j = 0; j < columns; ++j) {
    float x = normal(random) * (kind == 1 ? 1e4f : 2.f) + (kind == 2 ? 100.f : 0.f);
    if (kind == 3 && j % 3) x = -INFINITY;
    if (kind == 4) x = 0.01f * float(j);  // rises block by block
    if (j >= valid) x = NAN;              // padding must not be read into anything
    row[j] = Scalar::from_float<T>(x);
  }
  const int64_t target = kind == 5 ? kIgnoreIndex : vocab_start + (valid ? int64_t(random() % valid) / 3 * 3 : 0);
  const double inverse_temperature = 0.9;
  const RowLayout layout{1, columns, columns};
  const Logits logits{row.get(), dtype, layout, 1, columns, valid, vocab_start, &target, nullptr, inverse_temperature};
  Statistics whole;
  statistics(logits, 0, 1, 0, columns, &whole);
  Statistics left, right;
  statistics(logits, 0, 1, 0, columns / 2, &left);
  statistics(logits, 0, 1, columns / 2, columns, &right);
  const float grad_log_prob = 0.7f, grad_entropy = -0.3f;
  const Gradient g{gradient.get(), layout, &whole, &grad_log_prob, kind % 2 ? &grad_entropy : nullptr, nullptr};
  logits_grad(logits, g, 0, 1);
  for (int64_t j = kind == 5 ? 0 : valid; j < columns; ++j)
    expect(Scalar::to_float(gradient[j]) == 0.f, "padding or ignored row has a gradient", valid, 1);
  if (valid == 0 || kind == 5) return;
  long double peak = -INFINITY, total = 0, weighted = 0;
  for (int64_t j = 0; j < valid; ++j) peak = std::fmax(peak, (long double)Scalar::to_float(row[j]));
  for (int64_t j = 0; j < valid; ++j) {
    const long double d = (Scalar::to_float(row[j]) - peak) * inverse_temperature, e = expl(d);
    total += e;
    if (e > 0) weighted += e * d;
  }
  const long double d = (Scalar::to_float(row[target - vocab_start]) - peak) * inverse_temperature;
  const double log_prob = double(d - logl(total)), entropy = double(logl(total) - weighted / total);
  const Result results[] = {finish(whole), finish(merged(left, right))};
  for (const Result& r : results) {
    const double error = std::fabs(r.log_prob - log_prob);
    expect(error <= std::fmax(1e-5, 1e-6 * std::fabs(log_prob)), "log-prob", valid, error);
    expect(std::fabs(r.entropy - entropy) <= 5e-6, "entropy", valid, std::fabs(r.entropy - entropy));
  }
  double sum = 0;
  for (int64_t j = 0; j < valid; ++j) sum += Scalar::to_float(gradient[j]);
  const double rounding = sizeof(T) == 4 ? 1e-5 : 2e-2;
  expect(std::fabs(sum) <= rounding, "gradient of a row does not sum to zero", valid, sum);
}

struct Form {
  Kind kind;
  float limit;
};
constexpr float kBeta = 0.3f;
constexpr Form kForms[] = {{Kind::kForwardKl, INFINITY}, {Kind::kReverseKl, INFINITY}, {Kind::kJsd, INFINITY},
                           {Kind::kForwardKl, 0.05f},    {Kind::kReverseKl, 0.05f},    {Kind::kJsd, 0.002f}};

// One column by definition: its probabilities and their logarithms.
struct Column {
  long double p, q, log_p, log_q;

  long double log_m() const { return logl(kBeta * p + (1 - kBeta) * q); }
  static long double part(long double x, long double log_x, long double log_y) {
    return x > 0 ? x * (log_x - log_y) : 0;
  }
  long double entry(Kind kind) const {
    if (kind == Kind::kForwardKl) return part(p, log_p, log_q);
    if (kind == Kind::kReverseKl) return part(q, log_q, log_p);
    return kBeta * part(p, log_p, log_m()) + (1 - kBeta) * part(q, log_q, log_m());
  }
  // Of a divergence without a limit, with respect to the student's logit / temperature. `slope`: the sum of q ln(q / p)
  // (reverse KL) or of q ln(q / m) (JSD).
  long double gradient(Kind kind, long double slope) const {
    if (kind == Kind::kForwardKl) return q - p;
    if (kind == Kind::kReverseKl) return part(q, log_q, log_p) - q * slope;
    return (1 - kBeta) * (part(q, log_q, log_m()) - q * slope);
  }
};

template <class T>
std::vector<Column> columns_of(const T* teacher, const T* student, int64_t valid, double inverse_temperature) {
  auto log_total = [&](const T* row, long double& peak) {
    long double total = 0;
    for (int64_t j = 0; j < valid; ++j) peak = std::fmax(peak, (long double)Scalar::to_float(row[j]));
    for (int64_t j = 0; j < valid; ++j) total += expl((Scalar::to_float(row[j]) - peak) * inverse_temperature);
    return logl(total);
  };
  long double t_peak = -INFINITY, s_peak = -INFINITY;
  const long double t_log = log_total(teacher, t_peak), s_log = log_total(student, s_peak);
  std::vector<Column> columns(valid);
  for (int64_t j = 0; j < valid; ++j) {
    const long double log_p = (Scalar::to_float(teacher[j]) - t_peak) * inverse_temperature - t_log;
    const long double log_q = (Scalar::to_float(student[j]) - s_peak) * inverse_temperature - s_log;
    columns[j] = {expl(log_p), expl(log_q), log_p, log_q};
  }
  return columns;
}

// The divergences of two rows: the first reading, the second, and the gradient over the student's logits.
template <class T>
void check_pair(Dtype dtype, int64_t columns, int64_t valid, int kind, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const std::unique_ptr<T[]> teacher(new T[columns]), student(new T[columns]), gradient(new T[columns]);
  for (int64_t j = 0; j < columns; ++j) {
    float t = 2 * normal(random), s = 2 * normal(random);
    if (kind == 1) s = t;
    if (kind == 2) s = t + 0.01f * s + 100.f;
    if (kind == 3 && j % 3) t = -INFINITY;  // q has mass where p has none
    if (kind == 3 && j % 3 == 2) s = -INFINITY;
    if (kind == 4) t = 0.01f * float(j), s = -t;
    if (kind == 5 && j == valid - 1) s = NAN;
    if (j >= valid) t = s = NAN;
    teacher[j] = Scalar::from_float<T>(t);
    student[j] = Scalar::from_float<T>(s);
  }
  const double inverse_temperature = 0.9;
  const RowLayout layout{1, columns, columns};
  std::vector<Column> exact;
  if (kind != 5) exact = columns_of(teacher.get(), student.get(), valid, inverse_temperature);
  for (const Form& form : kForms) {
    const bool plain_kl = form.limit == INFINITY && form.kind != Kind::kJsd;
    const bool student_first = plain_kl && form.kind == Kind::kReverseKl;
    const Pair pair{teacher.get(), student.get(), dtype, layout, layout, 1, columns, valid, inverse_temperature};
    Pair read = pair;
    if (student_first) std::swap(read.first, read.second);
    PairStatistics left, right;
    pair_statistics(read, student_first, 0, 1, 0, columns / 2, &left);
    pair_statistics(read, student_first, 0, 1, columns / 2, columns, &right);
    const PairSums sums = merged(widened(left), widened(right), inverse_temperature);
    const PairValues values = pair_values(sums, inverse_temperature, student_first);
    const Entries entries{&values.scale, form.kind, form.limit, kBeta};
    EntrySums whole{values.divergence, 0.f, values.divergence};
    if (!plain_kl) {
      EntrySums first, second;
      entry_sums(pair, entries, 0, 1, 0, columns / 2, &first);
      entry_sums(pair, entries, 0, 1, columns / 2, columns, &second);
      whole = merged(first, second);
    }
    const float grad_value = 0.7f;
    std::copy(student.get(), student.get() + columns, gradient.get());
    Pair in_place = pair;
    in_place.second = gradient.get();
    pair_gradient(in_place, entries, {gradient.get(), layout, &whole, &grad_value}, 0, 1);
    for (int64_t j = valid; j < columns; ++j)
      expect(Scalar::to_float(gradient[j]) == 0.f, "padding has a gradient of a divergence", valid, 1);
    if (valid == 0) continue;
    if (kind == 5) {
      expect(whole.value != whole.value, "a NaN is lost", valid, whole.value);
      continue;
    }
    long double value = 0, entropy = 0, slope = 0, sum = 0;
    for (const Column& c : exact) {
      value += std::fmin(c.entry(form.kind), (long double)form.limit);
      entropy -= Column::part(c.p, c.log_p, 0);
      slope += Column::part(c.q, c.log_q, form.kind == Kind::kReverseKl ? c.log_p : c.log_m());
    }
    const double entropy_error = values.teacher_entropy - double(entropy);
    expect(std::fabs(entropy_error) <= 5e-6, "teacher's entropy", valid, entropy_error);
    if (std::isinf(value)) {
      expect(whole.value == INFINITY, "a divergence is not infinite", valid, whole.value);
      continue;
    }
    const double scale = std::fmax(1.0, std::fabs(double(value)));
    expect(std::fabs(whole.value - value) <= 3e-6 * scale, "divergence", valid, whole.value - double(value));
    expect(kind != 1 || whole.value == 0.f, "equal rows have a divergence", valid, whole.value);
    const double rounding = dtype == Dtype::kFloat32 ? 0 : dtype == Dtype::kBFloat16 ? 0x1p-8 : 0x1p-11;
    for (int64_t j = 0; j < valid; ++j) {
      const double got = Scalar::to_float(gradient[j]);
      const double wanted = grad_value * inverse_temperature * double(exact[j].gradient(form.kind, slope));
      sum += got;
      if (form.limit < INFINITY) continue;
      expect(std::fabs(got - wanted) <= 2e-6 * scale + rounding * std::fabs(wanted), "gradient", valid, got - wanted);
    }
    const double allowed = (rounding > 0 ? 2e-2 : 1e-5) * scale;
    expect(std::fabs(sum) <= allowed, "gradient of a divergence does not sum to zero", valid, sum);
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (int64_t columns : {1, 2, 7, 16, 31, 32, 33, 63, 64, 65, 127, 200, 2047, 2048, 2049, 5003})
    for (int64_t padding : {0, 1, 40})
      for (int kind = 0; kind <= 5; ++kind) {
        const int64_t valid = columns > padding ? columns - padding : 0;
        check<Float32>(Dtype::kFloat32, columns, valid, 1000, kind, random);
        check<BFloat16>(Dtype::kBFloat16, columns, valid, 0, kind, random);
        check<Float16>(Dtype::kFloat16, columns, valid, 5, kind, random);
      }
  for (int64_t columns : {1, 2, 7, 16, 31, 32, 33, 63, 64, 65, 127, 2047, 2048, 2049, 5003})
    for (int64_t padding : {0, 1, 40})
      for (int kind = 0; kind <= 5; ++kind) {
        const int64_t valid = columns > padding ? columns - padding : 0;
        check_pair<Float32>(Dtype::kFloat32, columns, valid, kind, random);
        check_pair<BFloat16>(Dtype::kBFloat16, columns, valid, kind, random);
        check_pair<Float16>(Dtype::kFloat16, columns, valid, kind, random);
      }
  for (uint32_t bits = 0; bits < 65536; ++bits) {  // every 16-bit number survives the round trip
    const Float16 half{uint16_t(bits)};
    const BFloat16 brain{uint16_t(bits)};
    const float h = Scalar::to_float(half), b = Scalar::to_float(brain);
    expect(h != h || Scalar::from_float<Float16>(h).bits == bits, "fp16 round trip", bits, h);
    expect(b != b || Scalar::from_float<BFloat16>(b).bits == bits, "bf16 round trip", bits, b);
  }
  std::vector<char> memory(4096 * 3);
  read_floor(memory.data(), 4096 * 3);
  read_write_floor(memory.data(), 4096 * 3);
  std::printf("%s: %s\n", instruction_set(), failures ? "FAILED" : "ok");
  return failures != 0;
}
