// SPDX-License-Identifier: Apache-2.0
// The CUDA backend's host code on CPU tensors, with its kernels in cuda_emulator.h: mio_ext_emulated::portable is
// mio_ext::pairwise_bce, with chunks of few bytes and few multiprocessors; ::hopper takes the kernel for compute
// capability 9.0 where there is one. tests/package/test_cuda.py builds it.
#include <torch/library.h>

#include "autograd.h"
#include "cuda/host.h"

namespace mio_ext {
namespace {

template <bool kHopper>
Outputs emulated(const Call& call) {
  check_supported(call);
  constexpr int kMultiprocessors = 3;
  constexpr int64_t kSmallChunk = 1;  // the least there can be
  return run_pairwise_bce(call, kMultiprocessors, kHopper, kSmallChunk, nullptr);
}

}  // namespace

TORCH_LIBRARY(mio_ext_emulated, m) {
  const std::string schema = std::string(kArguments) + kOutputs;
  m.def(("portable" + schema).c_str());
  m.def(("hopper" + schema).c_str());
}
constexpr char kPortable[] = "mio_ext_emulated::portable", kHopperOp[] = "mio_ext_emulated::hopper";
TORCH_LIBRARY_IMPL(mio_ext_emulated, Autograd, m) {
  m.impl("portable", differentiable<kPortable>);
  m.impl("hopper", differentiable<kHopperOp>);
}
TORCH_LIBRARY_IMPL(mio_ext_emulated, CPU, m) {
  m.impl("portable", from_dispatcher<emulated<false>>);
  m.impl("hopper", from_dispatcher<emulated<true>>);
}

}  // namespace mio_ext
