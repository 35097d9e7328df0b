// SPDX-License-Identifier: Apache-2.0
// One call of the op mio_ext::pairwise_bce: its arguments, what is asked of them, and the way from the dispatcher to
// an implementation, the same for every device. Users meet the friendlier checks of mio_ext/checks.py first; check()
// guards direct calls of the op. It reads no tensor's values.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "pairwise_bce.h"
#include "tensor.h"

namespace mio_ext {

// loss, stats, dx, dy, dparams
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// csrc/ops.cpp says what they mean.
inline constexpr char kArguments[] =
    "(Tensor x, Tensor? y, Tensor? x_ids, Tensor? y_ids, Tensor? params, float[] constants, SymInt shift, "
    "SymInt offset, bool exclude_self, bool normalize, bool[3] needs_grad, Tensor? x2=None, bool tf32=False) -> ";
inline constexpr char kOutputs[] = "(Tensor loss, Tensor stats, Tensor dx, Tensor dy, Tensor dparams)";

struct Call {
  const Tensor& x;
  const std::optional<Tensor>&y, &x_ids, &y_ids, &params;
  const std::vector<double>& constants;
  int64_t shift, offset;
  bool exclude_self, normalize;
  const std::vector<bool>& needs_grad;
  const std::optional<Tensor>& x2;
  bool tf32;

  int64_t m() const { return x.size(0) + (x2 ? x2->size(0) : 0); }
  int64_t k() const { return y ? y->size(0) : m(); }
  int64_t d() const { return x.size(1); }
  ScalarType loss_type() const {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  void check() const {
    MIO_CHECK(x.dim() == 2 && x.size(0) > 0 && x.size(1) > 0, "x must be [M, D], got ", SizesOf{x});
    const ScalarType type = x.scalar_type();
    MIO_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                  type == ScalarType::BFloat16,
              "x must be float32, float64, float16 or bfloat16, got ", type);
    if (x2)
      MIO_CHECK(x2->dim() == 2 && x2->size(1) == d() && x2->scalar_type() == type && x2->device() == x.device(),
                "x2 must be [M2, ", d(), "], ", type, ", on ", DeviceOf{x}, " like x; got ", SizesOf{*x2}, ", ",
                x2->scalar_type(), ", on ", DeviceOf{*x2});
    if (y) {
      MIO_CHECK(y->dim() == 2 && y->size(0) > 0 && y->size(1) == d(), "y must be [K, ", d(), "] like x, got ",
                SizesOf{*y});
      MIO_CHECK(y->scalar_type() == type, "y must be ", type, " like x, got ", y->scalar_type());
      MIO_CHECK(y->device() == x.device(), "y must be on ", DeviceOf{x}, " like x, got ", DeviceOf{*y});
    }
    check_ids(x_ids, "x_ids", m());
    if (y) check_ids(y_ids, "y_ids", k());
    MIO_CHECK(y_ids.has_value() == (y && x_ids), "y_ids must be given with x_ids and y, and only then");
    MIO_CHECK(constants.size() == (params ? 0 : 6), "give six constants, or params and no constants; got ",
              constants.size(), params ? " with params" : " without params");
    if (params)
      MIO_CHECK(params->dim() == 1 && params->size(0) == 6 && params->scalar_type() == loss_type() &&
                    params->device() == x.device(),
                "params must be [6], ", loss_type(), ", on ", DeviceOf{x}, "; got ", SizesOf{*params}, ", ",
                params->scalar_type(), ", on ", DeviceOf{*params});
    MIO_CHECK(shift >= 0 && shift < m(), "shift must be in [0, ", m(), "), got ", shift);
    MIO_CHECK(y || offset == 0, "offset must be 0 without y, got ", offset);
    MIO_CHECK(offset >= 0, "offset must be at least 0, got ", offset);
    MIO_CHECK(y || x_ids || shift * 2 % m() == 0,
              "without y and ids the positives must be mutual, shift 0 or M/2; got shift ", shift, " with M = ", m());
    MIO_CHECK(y || !needs_grad[1], "there is no gradient for y = None");
    MIO_CHECK(normalize || params || constants[5] == 0, "the linear weight needs normalize, got ", constants[5],
              " without");
  }

 private:
  void check_ids(const std::optional<Tensor>& ids, const char* name, int64_t rows) const {
    if (!ids) return;
    MIO_CHECK(ids->scalar_type() == ScalarType::Long, name, " must be int64, got ", ids->scalar_type());
    MIO_CHECK(ids->dim() == 1 && ids->size(0) == rows, name, " must be [", rows, "], got ", SizesOf{*ids});
    MIO_CHECK(ids->device() == x.device(), name, " must be on ", DeviceOf{x}, " like x, got ", DeviceOf{*ids});
  }
};

// What the dispatcher calls, with the schema's arguments: run(call), once they are checked.
template <auto run>
auto from_dispatcher(const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& x_ids,
                     const std::optional<Tensor>& y_ids, const std::optional<Tensor>& params,
                     const std::vector<double>& constants, int64_t shift, int64_t offset, bool exclude_self,
                     bool normalize, const std::vector<bool>& needs_grad, const std::optional<Tensor>& x2, bool tf32) {
  const Call call{x, y, x_ids, y_ids, params, constants, shift, offset, exclude_self, normalize, needs_grad, x2, tf32};
  call.check();
  return run(call);
}

}  // namespace mio_ext
