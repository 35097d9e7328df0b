// SPDX-License-Identifier: Apache-2.0
// CUDA implementation of the op: check, allocate, choose the arithmetic, launch. Nothing here waits for the device.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../check_inputs.h"
#include "pairwise_bce_cuda.h"

namespace mio_ext {
namespace {

using at::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// float32 as torch.set_float32_matmul_precision() says: "highest" is not TF32.
Arithmetic arithmetic_of(at::ScalarType type) {
  if (type == at::kBFloat16) return Arithmetic::kBf16;
  if (type == at::kHalf) return Arithmetic::kFp16;
  return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST ? Arithmetic::kFp16x3
                                                                                             : Arithmetic::kTf32;
}

void check_supported(const Tensor& x, const std::optional<Tensor>& y, int capability) {
  TORCH_CHECK_TYPE(
      x.scalar_type() != at::kDouble,
      "pairwise_bce: backend 'cuda' takes float32, bfloat16 and float16, got float64; use backend='triton' "
      "or 'reference'");
  TORCH_CHECK_VALUE(x.size(1) <= kMaxFusedFeatures, "pairwise_bce: backend 'cuda' takes up to ", kMaxFusedFeatures,
                    " features, got ", x.size(1), "; use backend='triton'");
  TORCH_CHECK_VALUE(x.size(0) <= kMaxRows && (!y || y->size(0) <= kMaxRows),
                    "pairwise_bce: backend 'cuda' takes up to ", kMaxRows, " rows, got ", x.size(0), y ? " and " : "",
                    y ? std::to_string(y->size(0)) : "");
  TORCH_CHECK(capability >= 8, "pairwise_bce: backend 'cuda' needs compute capability 8.0 or later, got ", capability,
              ".x");
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

Features features(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

Outputs pairwise_bce(const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& x_ids,
                     const std::optional<Tensor>& y_ids, const std::optional<Tensor>& params,
                     at::ArrayRef<double> constants, int64_t shift, int64_t offset, bool exclude_self, bool normalize,
                     std::array<bool, 3> needs_grad) {
  check_inputs(x, y, x_ids, y_ids, params, constants, shift, offset, normalize, needs_grad);
  const c10::cuda::CUDAGuard guard(x.device());
  const int device = x.get_device();
  check_supported(x, y, device_attribute(cudaDevAttrComputeCapabilityMajor, device));

  const auto options = x.options().dtype(at::kFloat);
  const Tensor row_ids = x_ids ? x_ids->contiguous() : Tensor(), col_ids = y_ids ? y_ids->contiguous() : Tensor();
  const Tensor numbers = params ? params->contiguous() : Tensor();
  auto wanted = [&](bool needs, at::IntArrayRef sizes) {
    return at::empty(needs ? sizes : at::IntArrayRef{0}, options);
  };
  const Tensor loss = at::empty({}, options), stats = at::empty({8}, options.dtype(at::kDouble));
  const Tensor dx = wanted(needs_grad[0], x.sizes()), dy = wanted(needs_grad[1], y ? y->sizes() : x.sizes());
  const Tensor dparams = wanted(needs_grad[2], {6});

  PairwiseBCECuda problem{};
  problem.arithmetic = arithmetic_of(x.scalar_type());
  problem.x = features(x);
  if (y) problem.y = features(*y);
  problem.x_ids = x_ids ? row_ids.const_data_ptr<int64_t>() : nullptr;
  problem.y_ids = y_ids ? col_ids.const_data_ptr<int64_t>() : nullptr;
  problem.m = static_cast<int>(x.size(0));
  problem.k = static_cast<int>(y ? y->size(0) : x.size(0));
  problem.d = static_cast<int>(x.size(1));
  problem.shift = static_cast<int>(shift);
  problem.offset = static_cast<int>(std::min<int64_t>(offset, problem.k));  // past the last column is past it
  problem.exclude_self = exclude_self;
  problem.normalize = normalize;
  problem.params = params ? numbers.const_data_ptr<float>() : nullptr;
  if (!params) problem.constants = {constants[0], constants[1], constants[2], constants[3], constants[4], constants[5]};
  problem.loss = loss.mutable_data_ptr<float>();
  problem.stats = stats.mutable_data_ptr<double>();
  problem.dx = needs_grad[0] ? dx.mutable_data_ptr<float>() : nullptr;
  problem.dy = needs_grad[1] ? dy.mutable_data_ptr<float>() : nullptr;
  problem.dparams = needs_grad[2] ? dparams.mutable_data_ptr<float>() : nullptr;
  problem.multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const Tensor workspace = at::empty({static_cast<int64_t>(workspace_bytes(problem))}, x.options().dtype(at::kByte));
  problem.workspace = workspace.mutable_data_ptr();

  launch_pairwise_bce(problem, c10::cuda::getCurrentCUDAStream(x.device().index()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, stats, dx, dy, dparams};
}

}  // namespace

TORCH_LIBRARY_IMPL(mio_ext, CUDA, m) { m.impl("pairwise_bce", pairwise_bce); }

}  // namespace mio_ext
