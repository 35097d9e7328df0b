// SPDX-License-Identifier: Apache-2.0
// The CUDA backend's host code on CPU tensors, with its kernels in cuda_emulator.h: mio_ext_emulated::portable is
// mio_ext::pairwise_bce, with chunks of few bytes and few multiprocessors; ::hopper takes the kernel for compute
// capability 9.0 where there is one. tests/test_cuda.py builds it.
#include <torch/library.h>

#include "cuda/host.h"

namespace mio_ext {
namespace {

template <bool kHopper>
Outputs emulated(const at::Tensor& x, const std::optional<at::Tensor>& y, const std::optional<at::Tensor>& x_ids,
                 const std::optional<at::Tensor>& y_ids, const std::optional<at::Tensor>& params,
                 at::ArrayRef<double> constants, int64_t shift, int64_t offset, bool exclude_self, bool normalize,
                 std::array<bool, 3> needs_grad, const std::optional<at::Tensor>& x2) {
  check_inputs(x, y, x_ids, y_ids, params, constants, shift, offset, normalize, needs_grad, x2);
  check_supported(x, y, x2);
  constexpr int kMultiprocessors = 3;
  constexpr int64_t kSmallChunk = 1;  // the least there can be
  return run_pairwise_bce(x, y, x_ids, y_ids, params, constants, shift, offset, exclude_self, normalize, needs_grad, x2,
                          kMultiprocessors, kHopper, kSmallChunk, nullptr);
}

}  // namespace

TORCH_LIBRARY(mio_ext_emulated, m) {
  const std::string arguments =
      "(Tensor x, Tensor? y, Tensor? x_ids, Tensor? y_ids, Tensor? params, float[] constants, SymInt shift, "
      "SymInt offset, bool exclude_self, bool normalize, bool[3] needs_grad, Tensor? x2=None) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)";
  m.def(("portable" + arguments).c_str());
  m.def(("hopper" + arguments).c_str());
}
TORCH_LIBRARY_IMPL(mio_ext_emulated, CPU, m) {
  m.impl("portable", emulated<false>);
  m.impl("hopper", emulated<true>);
}

}  // namespace mio_ext
