// SPDX-License-Identifier: Apache-2.0
// CUDA implementation of the op: what host.h does, on the features' device and its stream.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "host.h"

namespace mio_ext {
namespace {

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

Outputs pairwise_bce(const Call& call) {
  check_supported(call);
  const c10::cuda::CUDAGuard guard(call.x.device());
  const int device = call.x.get_device(), major = device_attribute(cudaDevAttrComputeCapabilityMajor, device),
            minor = device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  TORCH_CHECK(major >= 8, "pairwise_bce: backend 'cuda' needs compute capability 8.0 or later, got ", major, ".",
              minor);
  // Small batches of few features go to the kernel that does it all in one launch.
  const bool small = std::max(call.m(), call.k()) <= kTogetherRows && call.d() <= kMaxFusedFeatures;
  const bool hopper = hopper_is_built() && major == 9 && minor == 0 && !small;
  // The library's products are of these types and no others.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Outputs outputs = run_pairwise_bce(call, device_attribute(cudaDevAttrMultiProcessorCount, device), hopper,
                                           kMaxRows, c10::cuda::getCurrentCUDAStream(call.x.device().index()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(mio_ext, CUDA, m) { m.impl("pairwise_bce", from_dispatcher<pairwise_bce>); }

}  // namespace mio_ext
