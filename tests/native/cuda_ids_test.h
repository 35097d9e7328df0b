// SPDX-License-Identifier: Apache-2.0
// Positive pairs by ids of every kind, for pairwise_bce_cuda_test.cpp.
#pragma once

#include <functional>
#include <iterator>

#include "cuda_test_problem.h"

namespace mio_ext {

// In tiles that are crossed by a diagonal and that are not: results, and counts to the last pair.
inline bool check_ids(const Type& type, const Options& options, const Case& c) {
  uint64_t inverse = 1;  // of kKeyFactor, modulo 2^64: the product of id + inverse k is k more, in bits that no key has
  for (int i = 0; i < 6; ++i) inverse *= 2 - kKeyFactor * inverse;
  const struct {
    const char* name;
    std::function<int64_t(int64_t, bool)> of;  // a row's or a column's number
  } kinds[] = {
      {"ten classes", [](int64_t i, bool) { return i % 10; }},
      {"one pair", [](int64_t i, bool column) { return column && i == 200 ? 12 : i + 1000 * column; }},
      {"a row of each class", [](int64_t i, bool) { return i; }},
      {"one class", [](int64_t, bool) { return 7; }},
      {"all different", [](int64_t i, bool column) { return i + 1000 * column; }},
      {"all negative", [](int64_t i, bool) { return -1 - i % 10; }},
      {"low words agree", [](int64_t i, bool) { return i % 10 << 32; }},
      {"high words agree", [](int64_t i, bool) { return (int64_t(1) << 40) + i % 10; }},
      {"keys agree", [=](int64_t i, bool) { return int64_t((uint64_t(1) << 40) + inverse * uint64_t(i % 10)); }},
  };
  const auto& last = kinds[std::size(kinds) - 1];
  if (key_of(last.of(1, false)) != key_of(last.of(2, false))) return false;
  const Input x(type, c.m, c.d, 1, 1), y(type, c.k, c.d, 1, 2);
  bool good = true;
  for (const auto& kind : kinds) {
    if (c.d > kMaxFusedFeatures && &kind > kinds + 1) break;
    std::vector<int64_t> x_ids(c.m), y_ids(c.k);
    for (int64_t i = 0; i < c.m; ++i) x_ids[i] = kind.of(i, false);
    for (int64_t j = 0; j < c.k; ++j) y_ids[j] = kind.of(j, true);
    const bool capped = (&kind - kinds) % 2 == 0;  // the terms: csrc/cuda/terms.cuh
    const LossParams params{4, capped ? 9.0 : 3.0, capped ? -9 : -0.5, 0.5, 1.0 / 64, 0.25};
    double positives = 0;
    for (int64_t i = 0; i < c.m; ++i)
      for (int64_t j = 0; j < c.k; ++j) positives += j != c.offset + i && x_ids[i] == y_ids[j];
    const Result expected = by_double_loop(c, x.values, y.values, x_ids, y_ids, params);
    const Outputs out = run(type, c, params, x, y, x_ids, y_ids, options);
    const double loss_error = std::abs(out.loss / expected.loss - 1);
    const double dx_error = relative_distance(out.dx, expected.dx), dy_error = relative_distance(out.dy, expected.dy);
    if (loss_error < type.loss_limit && dx_error < type.gradient_limit && dy_error < type.gradient_limit &&
        out.stats[0] == positives && out.stats[1] == double(c.m * (c.k - 1)) - positives)
      continue;
    std::printf("\n  %s: loss %.1e dx %.1e dy %.1e, %.0f positive pairs of %.0f", kind.name, loss_error, dx_error,
                dy_error, out.stats[0], positives);
    good = false;
  }
  return good;
}

}  // namespace mio_ext
