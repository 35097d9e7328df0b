// SPDX-License-Identifier: Apache-2.0
// CUDA implementation of the op: what host.h does, on the features' device and its stream.
#if !defined(USE_CUDA)
#define USE_CUDA  // has torch's headers name what is CUDA's
#endif
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "host.h"

namespace mio_ext {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) fail("CUDA error: ", cudaGetErrorString(error), " (pairwise_bce, backend 'cuda')");
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

Outputs pairwise_bce(const Call& call) {
  check_supported(call);
  const int device = call.x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, device),
            minor = device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (major < 8) fail("backend 'cuda' needs compute capability 8.0 or later, got ", major, ".", minor);
  // Small batches of few features go to the kernel that does it all in one launch.
  const bool small = std::max(call.m(), call.k()) <= kTogetherRows && call.d() <= kMaxFusedFeatures;
  const bool hopper = hopper_is_built() && major == 9 && minor == 0 && !small;
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const Outputs outputs = run_pairwise_bce(call, device_attribute(cudaDevAttrMultiProcessorCount, device), hopper,
                                           kMaxRows, static_cast<Stream>(stream));
  check(cudaGetLastError());
  return outputs;
}

std::tuple<std::string, int64_t, int64_t> cuda_versions() {
  int runtime = 0, driver = 0;
  check(cudaRuntimeGetVersion(&runtime));
  check(cudaDriverGetVersion(&driver));
  return {MIO_VERSION, runtime, driver};
}

}  // namespace

// Of the package, of the CUDA runtime in this library, and the latest that the machine's driver knows (0: no driver).
MIO_LIBRARY_FRAGMENT(MIO_OPS, m) { m.def("cuda_versions() -> (str, int, int)"); }
MIO_LIBRARY_IMPL(MIO_OPS, CompositeExplicitAutograd, m) { m.impl("cuda_versions", TORCH_BOX(&cuda_versions)); }
MIO_LIBRARY_IMPL(MIO_OPS, CUDA, m) { m.impl("pairwise_bce", TORCH_BOX(&from_dispatcher<pairwise_bce>)); }

}  // namespace mio_ext
