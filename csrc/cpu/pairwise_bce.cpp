// SPDX-License-Identifier: Apache-2.0
// CPU implementation of the op: check, allocate, run the kernel, round to the op's types.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "../check_inputs.h"
#include "pairwise_bce_cpu.h"

namespace mio_ext {
namespace {

using at::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

void parallel_on_torch_threads(int n, const std::function<void(int)>& body) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
  });
}

// The fields of reference.PairStats. t is minus the logit on positive pairs.
void write_stats(const PairSums& s, double* out) {
  const ClassSums &p = s.positive, &n = s.negative;
  const double values[8] = {p.count,
                            n.count,
                            p.softplus / p.count,
                            n.softplus / n.count,
                            p.product / p.count,
                            n.product / n.count,
                            1 - p.sigmoid / p.count,
                            n.sigmoid / n.count};
  std::copy(values, values + 8, out);
}

template <typename T>
Outputs pairwise_bce_of(const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& x_ids,
                        const std::optional<Tensor>& y_ids, const std::optional<Tensor>& params,
                        at::ArrayRef<double> constants, int64_t shift, int64_t offset, bool exclude_self,
                        bool normalize, const std::array<bool, 3>& needs_grad) {
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  auto dense = [&](const Tensor& t) { return t.to(options.dtype()).contiguous(); };
  const Tensor rows = dense(x), columns = y ? dense(*y) : Tensor();
  const Tensor row_ids = x_ids ? x_ids->contiguous() : Tensor(), col_ids = y_ids ? y_ids->contiguous() : Tensor();

  auto wanted = [&](bool needs, const Tensor& like) { return needs ? at::empty_like(like) : at::empty({0}, options); };
  Tensor dx = wanted(needs_grad[0], rows), dy = wanted(needs_grad[1], columns);
  Tensor dparams = at::empty({needs_grad[2] ? 6 : 0}, options);
  Tensor stats = at::empty({8}, options.dtype(at::kDouble));

  PairwiseBCE<T> problem{};
  problem.x = rows.const_data_ptr<T>();
  problem.y = y ? columns.const_data_ptr<T>() : nullptr;
  problem.x_ids = x_ids ? row_ids.const_data_ptr<int64_t>() : nullptr;
  problem.y_ids = y_ids ? col_ids.const_data_ptr<int64_t>() : nullptr;
  problem.m = rows.size(0);
  problem.k = y ? columns.size(0) : rows.size(0);
  problem.d = rows.size(1);
  problem.shift = shift;
  problem.offset = offset;
  problem.exclude_self = exclude_self;
  problem.bfloat16 = x.scalar_type() == at::kBFloat16;
  problem.normalize = normalize;
  double values[6];
  for (int i = 0; i < 6; ++i) values[i] = params ? (*params)[i].item<double>() : constants[i];
  for (int i = 0; i < 2; ++i)
    if (!(values[i] > 0 && values[i] < std::numeric_limits<double>::infinity()))
      values[i] = std::numeric_limits<double>::quiet_NaN();
  problem.params = {values[0], values[1], values[2], values[3], values[4], values[5]};
  problem.dx = needs_grad[0] ? dx.mutable_data_ptr<T>() : nullptr;
  problem.dy = needs_grad[1] ? dy.mutable_data_ptr<T>() : nullptr;

  const PairSums sums = pairwise_bce_cpu(problem, at::get_num_threads(), parallel_on_torch_threads);

  if (needs_grad[2]) {
    problem.params.gradient(sums, values);
    std::copy(values, values + 6, dparams.mutable_data_ptr<T>());
  }
  write_stats(sums, stats.mutable_data_ptr<double>());
  return {at::scalar_tensor(problem.params.loss(sums), options), stats, dx, dy, dparams};
}

Outputs pairwise_bce(const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& x_ids,
                     const std::optional<Tensor>& y_ids, const std::optional<Tensor>& params,
                     at::ArrayRef<double> constants, int64_t shift, int64_t offset, bool exclude_self, bool normalize,
                     std::array<bool, 3> needs_grad, const std::optional<at::Tensor>& x2) {
  check_inputs(x, y, x_ids, y_ids, params, constants, shift, offset, normalize, needs_grad, x2);
  auto run = x.scalar_type() == at::kDouble ? pairwise_bce_of<double> : pairwise_bce_of<float>;
  return run(x2 ? at::cat({x, *x2}) : x, y, x_ids, y_ids, params, constants, shift, offset, exclude_self, normalize,
             needs_grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(mio_ext, CPU, m) { m.impl("pairwise_bce", pairwise_bce); }

}  // namespace mio_ext
