// SPDX-License-Identifier: Apache-2.0
// The check as an op, for implementations of pairwise_bce that are not in C++. It reads no tensor's values.
#include "check_inputs.h"

#include <torch/library.h>

namespace mio_ext {
namespace {

void check_inputs_op(const at::Tensor& x, const std::optional<at::Tensor>& y, const std::optional<at::Tensor>& x_ids,
                     const std::optional<at::Tensor>& y_ids, const std::optional<at::Tensor>& params,
                     at::ArrayRef<double> constants, int64_t shift, int64_t offset, bool /*exclude_self*/,
                     bool normalize, std::array<bool, 3> needs_grad, const std::optional<at::Tensor>& x2) {
  check_inputs(x, y, x_ids, y_ids, params, constants, shift, offset, normalize, needs_grad, x2);
}

}  // namespace

TORCH_LIBRARY_IMPL(mio_ext, CompositeExplicitAutograd, m) { m.impl("check_inputs", check_inputs_op); }

}  // namespace mio_ext
