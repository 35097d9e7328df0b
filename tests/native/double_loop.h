// SPDX-License-Identifier: Apache-2.0
// Eq. (11)-(12) and its gradient pair by pair in float64: what the C++ tests hold the kernels to.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "pairwise_bce.h"

namespace mio_ext {

struct Case {
  int64_t m, k, d;  // k = 0: y = x
  int64_t shift, offset;
  bool exclude_self, normalize, ids;
};

inline std::vector<double> random_matrix(int64_t rows, int64_t cols, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, 1 / std::sqrt(double(cols)));
  std::vector<double> values(rows * cols);
  for (double& v : values) v = normal(generator);
  return values;
}

struct Result {
  double loss = 0;
  double scale_gradient = 0;  // d loss / d a_n
  // Means over negative pairs.
  double mean_loss = 0, mean_product = 0, mean_sigmoid = 0;
  std::vector<double> dx, dy;
};

// Eq. (11)-(12) and its gradient, pair by pair.
inline Result by_double_loop(const Case& c, std::vector<double> x, std::vector<double> y,
                             const std::vector<int64_t>& x_ids, const std::vector<int64_t>& y_ids,
                             const LossParams& p) {
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
  double negatives = 0;
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
      const double g = (positive ? -p.weight_p : p.weight_n) * a / (1 + std::exp(-t));
      if (!positive) {
        negatives += 1, r.mean_product += s;
        r.mean_loss += std::log1p(std::exp(t)), r.mean_sigmoid += 1 / (1 + std::exp(-t));
        r.scale_gradient += p.weight_n * s / (1 + std::exp(-t));
      }
      const double w_l = positive ? p.weight_l : 0;
      r.loss += w_l * distance;
      for (int64_t f = 0; f < c.d; ++f) {
        const double a = x[i * c.d + f], b = y[j * c.d + f];
        r.dx[i * c.d + f] += g * b + w_l * (a - b);
        r.dy[j * c.d + f] += g * a + w_l * (b - a);
      }
    }
  r.mean_loss /= negatives, r.mean_product /= negatives, r.mean_sigmoid /= negatives;
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

}  // namespace mio_ext
