// SPDX-License-Identifier: Apache-2.0
// CPU implementation of the op: allocate, run the kernel, round to the op's types.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "../call.h"
#include "pairwise_bce_cpu.h"

namespace mio_ext {
namespace {

void parallel_on_torch_threads(int n, const std::function<void(int)>& body) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
  });
}

double positive_or_nan(double scale) {
  return scale > 0 && scale < std::numeric_limits<double>::infinity() ? scale
                                                                      : std::numeric_limits<double>::quiet_NaN();
}

template <typename T>
LossParams loss_params(const Call& call) {
  double v[6];
  if (call.params)
    for (int i = 0; i < 6; ++i) v[i] = call.params->const_data_ptr<T>()[i * call.params->stride(0)];
  else
    std::copy_n(call.constants.data(), 6, v);
  return {positive_or_nan(v[0]), positive_or_nan(v[1]), v[2], v[3], v[4], v[5]};
}

template <typename T>
Outputs run(const Call& call) {
  static constexpr ScalarType type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  auto dense = [](const Tensor& t) { return packed(t.scalar_type() == type ? t : torch::stable::to(t, type)); };
  const Tensor x = dense(call.x);
  const std::optional<Tensor> x2 = map(call.x2, dense), y = map(call.y, dense);
  const std::optional<Tensor> x_ids = map(call.x_ids, packed), y_ids = map(call.y_ids, packed);

  const auto& needs = call.needs_grad;
  auto made = [&](std::initializer_list<int64_t> sizes) { return empty(sizes, type, call.x); };
  const Tensor dx = needs[0] ? made({call.m(), call.d()}) : made({0});
  const Tensor dy = needs[1] ? made({call.k(), call.d()}) : made({0});
  const Tensor dparams = made({needs[2] ? 6 : 0}), loss = made({}), stats = empty({8}, ScalarType::Double, call.x);

  PairwiseBCE<T> problem{};
  problem.x = x.const_data_ptr<T>();
  problem.x2 = x2 ? x2->const_data_ptr<T>() : nullptr;
  problem.x_rows = call.x.size(0);
  problem.y = y ? y->const_data_ptr<T>() : nullptr;
  problem.x_ids = x_ids ? x_ids->const_data_ptr<int64_t>() : nullptr;
  problem.y_ids = y_ids ? y_ids->const_data_ptr<int64_t>() : nullptr;
  problem.m = call.m();
  problem.k = call.k();
  problem.d = call.d();
  problem.shift = call.shift;
  problem.offset = call.offset;
  problem.exclude_self = call.exclude_self;
  problem.bfloat16 = call.x.scalar_type() == ScalarType::BFloat16;
  problem.normalize = call.normalize;
  problem.params = loss_params<T>(call);
  problem.dx = needs[0] ? dx.mutable_data_ptr<T>() : nullptr;
  problem.dy = needs[1] ? dy.mutable_data_ptr<T>() : nullptr;

  const PairSums sums = pairwise_bce_cpu(problem, int(torch::stable::get_num_threads()), parallel_on_torch_threads);

  *loss.mutable_data_ptr<T>() = T(problem.params.loss(sums));
  sums.statistics(stats.mutable_data_ptr<double>());
  if (needs[2]) {
    double gradient[6];
    problem.params.gradient(sums, gradient);
    std::copy_n(gradient, 6, dparams.mutable_data_ptr<T>());
  }
  return {loss, stats, dx, dy, dparams};
}

Outputs pairwise_bce(const Call& call) {
  return call.loss_type() == ScalarType::Double ? run<double>(call) : run<float>(call);
}

}  // namespace

MIO_LIBRARY_IMPL(MIO_OPS, CPU, m) { m.impl("pairwise_bce", TORCH_BOX(&from_dispatcher<pairwise_bce>)); }

}  // namespace mio_ext
