// SPDX-License-Identifier: Apache-2.0
// One call of the op mio_ext::pairwise_bce: its arguments, what is asked of them, and the way from the dispatcher to
// an implementation, the same for every device. Users meet the friendlier checks of mio_ext/checks.py first; check()
// guards direct calls of the op. It reads no tensor's values.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>

#include "pairwise_bce.h"

namespace mio_ext {

// loss, stats, dx, dy, dparams
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// csrc/ops.cpp says what they mean.
inline constexpr char kArguments[] =
    "(Tensor x, Tensor? y, Tensor? x_ids, Tensor? y_ids, Tensor? params, float[] constants, SymInt shift, "
    "SymInt offset, bool exclude_self, bool normalize, bool[3] needs_grad, Tensor? x2=None) -> ";
inline constexpr char kOutputs[] = "(Tensor loss, Tensor stats, Tensor dx, Tensor dy, Tensor dparams)";

struct Call {
  const at::Tensor& x;
  const std::optional<at::Tensor>&y, &x_ids, &y_ids, &params;
  at::ArrayRef<double> constants;
  int64_t shift, offset;
  bool exclude_self, normalize;
  std::array<bool, 3> needs_grad;
  const std::optional<at::Tensor>& x2;

  int64_t m() const { return x.size(0) + (x2 ? x2->size(0) : 0); }
  int64_t k() const { return y ? y->size(0) : m(); }
  int64_t d() const { return x.size(1); }
  at::ScalarType loss_type() const { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

  void check() const {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) > 0 && x.size(1) > 0, "pairwise_bce: x must be [M, D], got ",
                      x.sizes());
    const at::ScalarType type = x.scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
                     "pairwise_bce: x must be float32, float64, float16 or bfloat16, got ", type);
    if (x2)
      TORCH_CHECK_VALUE(x2->dim() == 2 && x2->size(1) == d() && x2->scalar_type() == type && x2->device() == x.device(),
                        "pairwise_bce: x2 must be [M2, ", d(), "], ", type, ", on ", x.device(), " like x; got ",
                        x2->sizes(), ", ", x2->scalar_type(), ", on ", x2->device());
    if (y) {
      TORCH_CHECK_VALUE(y->dim() == 2 && y->size(0) > 0 && y->size(1) == d(), "pairwise_bce: y must be [K, ", d(),
                        "] like x, got ", y->sizes());
      TORCH_CHECK_TYPE(y->scalar_type() == type, "pairwise_bce: y must be ", type, " like x, got ", y->scalar_type());
      TORCH_CHECK_VALUE(y->device() == x.device(), "pairwise_bce: y must be on ", x.device(), " like x, got ",
                        y->device());
    }
    check_ids(x_ids, "x_ids", m());
    if (y) check_ids(y_ids, "y_ids", k());
    TORCH_CHECK_VALUE(y_ids.has_value() == (y && x_ids),
                      "pairwise_bce: y_ids must be given with x_ids and y, and only then");
    TORCH_CHECK_VALUE(constants.size() == (params ? 0 : 6),
                      "pairwise_bce: give six constants, or params and no constants; got ", constants.size(),
                      params ? " with params" : " without params");
    if (params)
      TORCH_CHECK_VALUE(params->dim() == 1 && params->size(0) == 6 && params->scalar_type() == loss_type() &&
                            params->device() == x.device(),
                        "pairwise_bce: params must be [6], ", loss_type(), ", on ", x.device(), "; got ",
                        params->sizes(), ", ", params->scalar_type(), ", on ", params->device());
    TORCH_CHECK_VALUE(shift >= 0 && shift < m(), "pairwise_bce: shift must be in [0, ", m(), "), got ", shift);
    TORCH_CHECK_VALUE(y || offset == 0, "pairwise_bce: offset must be 0 without y, got ", offset);
    TORCH_CHECK_VALUE(offset >= 0, "pairwise_bce: offset must be at least 0, got ", offset);
    TORCH_CHECK_VALUE(y || x_ids || shift * 2 % m() == 0,
                      "pairwise_bce: without y and ids the positives must be mutual, shift 0 or M/2; got shift ", shift,
                      " with M = ", m());
    TORCH_CHECK_VALUE(y || !needs_grad[1], "pairwise_bce: there is no gradient for y = None");
    TORCH_CHECK_VALUE(normalize || params || constants[5] == 0, "pairwise_bce: the linear weight needs normalize, got ",
                      constants[5], " without");
  }

 private:
  void check_ids(const std::optional<at::Tensor>& ids, const char* name, int64_t rows) const {
    if (!ids) return;
    TORCH_CHECK_TYPE(ids->scalar_type() == at::kLong, "pairwise_bce: ", name, " must be int64, got ",
                     ids->scalar_type());
    TORCH_CHECK_VALUE(ids->dim() == 1 && ids->size(0) == rows, "pairwise_bce: ", name, " must be [", rows, "], got ",
                      ids->sizes());
    TORCH_CHECK_VALUE(ids->device() == x.device(), "pairwise_bce: ", name, " must be on ", x.device(), " like x, got ",
                      ids->device());
  }
};

// What the dispatcher calls, with the schema's arguments: run(call), once they are checked.
template <auto run>
auto from_dispatcher(const at::Tensor& x, const std::optional<at::Tensor>& y, const std::optional<at::Tensor>& x_ids,
                     const std::optional<at::Tensor>& y_ids, const std::optional<at::Tensor>& params,
                     at::ArrayRef<double> constants, int64_t shift, int64_t offset, bool exclude_self, bool normalize,
                     std::array<bool, 3> needs_grad, const std::optional<at::Tensor>& x2) {
  const Call call{x, y, x_ids, y_ids, params, constants, shift, offset, exclude_self, normalize, needs_grad, x2};
  call.check();
  return run(call);
}

}  // namespace mio_ext
