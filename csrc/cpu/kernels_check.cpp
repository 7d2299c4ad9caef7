// A stand-alone test of the CPU core for the sanitizers (tools/check_sanitizers.sh): every row lives in a heap block of
// exactly its size, so that a read or write one element too far is seen. Values are checked against long double.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
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
