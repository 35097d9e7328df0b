// SPDX-License-Identifier: Apache-2.0
// The CUDA backend's host code on CPU tensors, with its kernels in cuda_emulator.h: mio_ext_emulated::portable is
// mio_ext::pairwise_bce, with the smallest chunks and few multiprocessors; ::hopper takes the kernels for compute
// capability 9.0 where there are such. tests/package/test_cuda.py builds it.
#include "cuda/host.h"

namespace mio_ext {
namespace {

template <bool kHopper>
Outputs emulated(const Call& call) {
  check_supported(call);
  constexpr int kMultiprocessors = 3;
  return run_pairwise_bce(call, kMultiprocessors, kHopper, kChunkMultiple, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY(mio_ext_emulated, m) {
  const std::string schema = std::string(kArguments) + kOutputs;
  m.def(("portable" + schema).c_str());
  m.def(("hopper" + schema).c_str());
}
STABLE_TORCH_LIBRARY_IMPL(mio_ext_emulated, CPU, m) {
  m.impl("portable", TORCH_BOX(&from_dispatcher<emulated<false>>));
  m.impl("hopper", TORCH_BOX(&from_dispatcher<emulated<true>>));
}

}  // namespace mio_ext
