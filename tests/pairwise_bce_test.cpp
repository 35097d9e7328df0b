// SPDX-License-Identifier: Apache-2.0
// The CPU kernel against a plain double loop over pairs, for every instruction set this machine has
// (MIO_CPU_ISA chooses; without it this program runs itself once for each).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cpu/openmp_threads.h"

namespace {

using mio_ext::PairSums;
using mio_ext::PairwiseBCE;

struct Case {
  int64_t m, k, d;  // k = 0: y = x
  int64_t shift, offset;
  bool exclude_self, normalize, ids;
};

std::vector<double> random_matrix(int64_t rows, int64_t cols, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, 1 / std::sqrt(double(cols)));
  std::vector<double> values(rows * cols);
  for (double& v : values) v = normal(generator);
  return values;
}

struct Result {
  double loss = 0;
  std::vector<double> dx, dy;
};

// Eq. (11)-(12) and its gradient, pair by pair.
Result by_double_loop(const Case& c, std::vector<double> x, std::vector<double> y, const std::vector<int64_t>& x_ids,
                      const std::vector<int64_t>& y_ids, const mio_ext::LossParams& p) {
  const bool symmetric = c.k == 0;
  const int64_t k = symmetric ? c.m : c.k;
  std::vector<double> x_norm(c.m, 1), y_norm(k, 1);
  auto normalize = [&](std::vector<double>& z, std::vector<double>& norms) {
    for (size_t i = 0; i < norms.size(); ++i) {
      double sum = 0;
      for (int64_t f = 0; f < c.d; ++f) sum += z[i * c.d + f] * z[i * c.d + f];
      norms[i] = std::sqrt(sum);
      for (int64_t f = 0; f < c.d; ++f) z[i * c.d + f] /= norms[i];
    }
  };
  if (symmetric) y = x;
  if (c.normalize) normalize(x, x_norm), normalize(y, y_norm);
  Result r;
  r.dx.assign(x.size(), 0);
  r.dy.assign(y.size(), 0);
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < k; ++j) {
      if (c.exclude_self && j == c.offset + i) continue;
      const bool positive = c.ids ? x_ids[i] == (symmetric ? x_ids : y_ids)[j] : j == c.offset + (i + c.shift) % c.m;
      double s = 0, distance = 0;
      for (int64_t f = 0; f < c.d; ++f) {
        const double a = x[i * c.d + f], b = y[j * c.d + f];
        s += a * b;
        distance += (a - b) * (a - b) / 2;
      }
      const double a = positive ? p.scale_p : p.scale_n, t = (positive ? -1 : 1) * (a * s + p.bias);
      r.loss += (positive ? p.weight_p : p.weight_n) * std::log1p(std::exp(t));
      double g = (positive ? -p.weight_p : p.weight_n) * a / (1 + std::exp(-t));
      if (positive && c.normalize) r.loss += p.weight_l * distance, g -= p.weight_l;
      for (int64_t f = 0; f < c.d; ++f) {
        r.dx[i * c.d + f] += g * y[j * c.d + f];
        r.dy[j * c.d + f] += g * x[i * c.d + f];
      }
    }
  auto through_norm = [&](const std::vector<double>& z, const std::vector<double>& norms, std::vector<double>& grad) {
    for (size_t i = 0; i < norms.size(); ++i) {
      double along = 0;
      for (int64_t f = 0; f < c.d; ++f) along += grad[i * c.d + f] * z[i * c.d + f];
      for (int64_t f = 0; f < c.d; ++f) grad[i * c.d + f] = (grad[i * c.d + f] - along * z[i * c.d + f]) / norms[i];
    }
  };
  if (c.normalize) through_norm(x, x_norm, r.dx), through_norm(y, y_norm, r.dy);
  if (symmetric)
    for (size_t i = 0; i < r.dx.size(); ++i) r.dx[i] += r.dy[i];
  return r;
}

template <typename T>
double relative_distance(const std::vector<T>& a, const std::vector<double>& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(difference / size);
}

template <typename T>
bool check(const Case& c, double limit) {
  const int64_t k = c.k ? c.k : c.m;
  const std::vector<double> x = random_matrix(c.m, c.d, 1), y = random_matrix(k, c.d, 2);
  const std::vector<T> x_t(x.begin(), x.end()), y_t(y.begin(), y.end());
  const std::vector<double> x_seen(x_t.begin(), x_t.end()), y_seen(y_t.begin(), y_t.end());
  std::vector<int64_t> x_ids(c.m), y_ids(k);
  for (int64_t i = 0; i < c.m; ++i) x_ids[i] = (i * 7 % 5) << 40;
  for (int64_t j = 0; j < k; ++j) y_ids[j] = (j * 3 % 5) << 40;

  PairwiseBCE<T> p{};
  p.x = x_t.data();
  p.y = c.k ? y_t.data() : nullptr;
  p.x_ids = c.ids ? x_ids.data() : nullptr;
  p.y_ids = c.ids && c.k ? y_ids.data() : nullptr;
  p.m = c.m, p.k = k, p.d = c.d;
  p.shift = c.shift, p.offset = c.offset;
  p.exclude_self = c.exclude_self, p.normalize = c.normalize;
  p.params = {4, 3, -0.5, 0.5, 0.02, c.normalize ? 0.3 : 0.0};
  const Result expected = by_double_loop(c, x_seen, y_seen, x_ids, y_ids, p.params);

  bool good = true;
  std::vector<T> first, first_dy;
  for (int threads : {1, 2, 5}) {
    std::vector<T> dx(c.m * c.d), dy(c.k * c.d);
    p.dx = dx.data();
    p.dy = c.k ? dy.data() : nullptr;
    const PairSums sums = mio_ext::pairwise_bce_cpu(p, threads, mio_ext::parallel_on_openmp);
    const double loss_error = std::abs(p.params.loss(sums) / expected.loss - 1);
    const double dx_error = relative_distance(dx, expected.dx);
    const double dy_error = c.k ? relative_distance(dy, expected.dy) : 0;
    // Written so that NaN fails.
    good = good && loss_error < limit && dx_error < 10 * limit && dy_error < 10 * limit;
    if (threads == 1) first = dx, first_dy = dy;
    good = good && dx == first && dy == first_dy;
    if (!good) {
      std::printf("FAILED m=%ld k=%ld d=%ld threads=%d: loss %.1e dx %.1e dy %.1e%s\n", long(c.m), long(c.k), long(c.d),
                  threads, loss_error, dx_error, dy_error,
                  dx == first && dy == first_dy ? "" : ", other bits than one thread");
      return false;
    }
  }
  return good;
}

}  // namespace

int main(int, char** argv) {
  if (std::getenv("MIO_CPU_ISA") == nullptr) {
    int failures = 0;
    for (const std::string& isa : mio_ext::cpu_instruction_sets())
      failures += std::system(("MIO_CPU_ISA=" + isa + " " + argv[0]).c_str()) != 0;
    return failures != 0;
  }
  const Case cases[] = {
      {1, 1, 1, 0, 0, false, false, false},      {3, 7, 5, 0, 2, false, false, false},
      {65, 31, 33, 1, 0, true, true, false},     {200, 333, 24, 5, 3, true, true, false},
      {200, 333, 24, 0, 1, true, false, true},   {1300, 1000, 9, 0, 0, false, false, false},
      {700, 90, 300, 0, 0, false, true, true},   {4, 0, 3, 2, 0, true, true, false},
      {33, 0, 16, 0, 0, false, false, false},    {250, 0, 20, 125, 0, true, true, false},
      {1026, 0, 129, 513, 0, true, true, false}, {1026, 0, 17, 513, 0, true, true, true},
      {3000, 0, 8, 1500, 0, true, true, false},
  };
  int failures = 0;
  for (const Case& c : cases) failures += !check<float>(c, 1e-6) + !check<double>(c, 1e-13);
  std::printf("%s: %d of %zu cases failed\n", mio_ext::cpu_instruction_set().c_str(), failures, 2 * std::size(cases));
  return failures != 0;
}
