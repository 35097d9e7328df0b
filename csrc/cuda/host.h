// SPDX-License-Identifier: Apache-2.0
// The op on tensors of any device whose kernels are linked: allocate, choose the path, launch. pairwise_bce.cpp has
// it run on a GPU; the tests, on the CPU with the kernels in an emulator. Nothing here waits for the device.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <algorithm>

#include "../call.h"
#include "launch.h"

namespace mio_ext {

// float32 as torch.set_float32_matmul_precision() says: "highest" is not TF32.
inline Arithmetic arithmetic_of(at::ScalarType type, int64_t d) {
  if (type == at::kBFloat16) return Arithmetic::kBf16;
  if (type == at::kHalf) return Arithmetic::kFp16;
  if (d > kMaxFusedFeatures) return Arithmetic::kFp32;
  // The setting's own getter fails once someone has used torch.backends.cuda.matmul.fp32_precision.
  const bool tf32 = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                    at::Float32Precision::TF32;
  return tf32 ? Arithmetic::kTf32 : Arithmetic::kFp16x3;
}

inline void check_supported(const Call& call) {
  TORCH_CHECK_TYPE(
      call.x.scalar_type() != at::kDouble,
      "pairwise_bce: backend 'cuda' takes float32, bfloat16 and float16, got float64; use backend='triton' "
      "or 'reference'");
  TORCH_CHECK_VALUE(call.m() <= kMaxRows && call.k() <= kMaxRows, "pairwise_bce: backend 'cuda' takes up to ", kMaxRows,
                    " rows, got ", call.m(), " and ", call.k());
}

// out = a b, or out += a b, in out's type, which for 16-bit operands is float32.
inline void product_into(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  if (a.scalar_type() == out.scalar_type())
    accumulate ? at::addmm_out(out, out, a, b) : at::mm_out(out, a, b);
  else if (a.is_cuda())
    accumulate ? at::addmm_out(out, out, a, b, out.scalar_type()) : at::mm_out(out, a, b, out.scalar_type());
  else  // no such product on the CPU
    product_into(out, a.to(out.scalar_type()), b.to(out.scalar_type()), accumulate);
}

// Whether a library multiplies as well by the rows as they come as by a copy; which, without normalize, has no others.
inline bool is_direct(const at::Tensor& z, bool normalize) {
  return !normalize && z.stride(1) == 1 && z.stride(0) % 8 == 0 && z.stride(0) >= z.size(1) &&
         reinterpret_cast<uintptr_t>(z.const_data_ptr()) % 16 == 0;
}

// Memory of O(chunk K). Units of 2 M K D operations: 2 without y, else 1 and one for each gradient.
inline void run_chunked(const PairwiseBCECuda& problem, const Call& call, const at::Tensor& workspace,
                        const at::Tensor& dx, const at::Tensor& dy, Stream stream) {
  using at::Tensor;
  const at::AutoDispatchBelowAutograd no_autograd;  // products with an `out` refuse features that require grad
  const at::ScalarType type = call.x.scalar_type();
  const ChunkedCopies copies = chunked_copies(problem);
  auto copy = [&](size_t start, int64_t rows) {
    const int64_t bytes = rows * copies.width * int64_t(at::elementSize(type));
    return workspace.narrow(0, int64_t(start), bytes).view(type).view({rows, copies.width});
  };
  // For the gradients. The first product takes the whole width, of the copies.
  auto right = [&](bool direct, const Tensor& z, size_t start, int64_t rows) {
    return direct ? z : copy(start, rows).narrow(1, 0, problem.d);
  };
  const bool logits = has_chunked_logits(problem);
  const Tensor x = problem.dy ? right(problem.x_direct, call.x, copies.x, copies.m_pad) : Tensor();
  const Tensor y = !problem.dx ? Tensor()
                   : call.y    ? right(problem.y_direct, *call.y, copies.y, copies.k_pad)
                               : right(problem.x_direct, call.x, copies.x, copies.k_pad);
  const int64_t chunk = chunk_rows(problem);
  Tensor products, g;
  if (!logits) {
    g = products = at::empty({chunk, copies.k_pad}, workspace.options().dtype(at::kFloat));
  } else if (problem.dx || problem.dy) {
    g = at::empty({chunk, copies.k_pad}, workspace.options().dtype(type));
  }
  launch_chunked_prepare(problem, stream);
  for (int64_t row0 = 0; row0 < problem.m; row0 += chunk) {
    const int64_t n = std::min(chunk, problem.m - row0);
    if (logits) {
      launch_chunked_logits(problem, g.defined() ? g.mutable_data_ptr() : nullptr, int(row0), int(n), stream);
    } else {
      const Tensor rows = copy(copies.x, copies.m_pad).narrow(0, row0, n);
      product_into(products.narrow(0, 0, n), rows, copy(copies.y, copies.k_pad).t(), false);  // (2), but for the norms
      launch_chunked_terms(problem, products.mutable_data_ptr<float>(), int(row0), int(n), stream);
    }
    if (problem.dx) product_into(dx.narrow(0, row0, n), g.narrow(0, 0, n).narrow(1, 0, y.size(0)), y, false);  // (9)
    if (problem.dy) product_into(dy, g.narrow(0, 0, n).narrow(1, 0, problem.k).t(), x.narrow(0, row0, n), row0 > 0);
  }
  launch_chunked_project(problem, stream);
}

inline Outputs run_pairwise_bce(const Call& call, int multiprocessors, bool hopper, int64_t most_chunk_rows,
                                Stream stream) {
  using at::Tensor;
  const auto options = call.x.options().dtype(at::kFloat);
  const int64_t m = call.m(), k = call.k(), d = call.d();
  const Tensor x_ids = call.x_ids ? call.x_ids->contiguous() : Tensor();
  const Tensor y_ids = call.y_ids ? call.y_ids->contiguous() : Tensor();
  const Tensor params = call.params ? call.params->contiguous() : Tensor();
  auto wanted = [&](bool needs, at::IntArrayRef sizes) {
    return at::empty(needs ? sizes : at::IntArrayRef{0}, options);
  };
  const Tensor loss = at::empty({}, options), stats = at::empty({8}, options.dtype(at::kDouble));
  const Tensor dx = wanted(call.needs_grad[0], {m, d}), dy = wanted(call.needs_grad[1], {k, d});
  const Tensor dparams = wanted(call.needs_grad[2], {6});

  auto features = [](const Tensor& t) { return Features{t.const_data_ptr(), t.stride(0), t.stride(1)}; };
  PairwiseBCECuda problem{};
  problem.arithmetic = arithmetic_of(call.x.scalar_type(), d);
  problem.x = features(call.x);
  problem.x_rows = int(call.x.size(0));
  if (call.x2) problem.x2 = features(*call.x2);
  if (call.y) problem.y = features(*call.y);
  problem.x_ids = call.x_ids ? x_ids.const_data_ptr<int64_t>() : nullptr;
  problem.y_ids = call.y_ids ? y_ids.const_data_ptr<int64_t>() : nullptr;
  problem.m = int(m);
  problem.k = int(k);
  problem.d = int(d);
  problem.shift = int(call.shift);
  problem.offset = int(std::min(call.offset, k));  // past the last column is past it
  problem.exclude_self = call.exclude_self;
  problem.normalize = call.normalize;
  problem.params = call.params ? params.const_data_ptr<float>() : nullptr;
  if (!call.params) {
    const auto& c = call.constants;
    problem.constants = {c[0], c[1], c[2], c[3], c[4], c[5]};
  }
  problem.loss = loss.mutable_data_ptr<float>();
  problem.stats = stats.mutable_data_ptr<double>();
  problem.dx = call.needs_grad[0] ? dx.mutable_data_ptr<float>() : nullptr;
  problem.dy = call.needs_grad[1] ? dy.mutable_data_ptr<float>() : nullptr;
  problem.dparams = call.needs_grad[2] ? dparams.mutable_data_ptr<float>() : nullptr;
  problem.multiprocessors = multiprocessors;
  problem.hopper = hopper;
  problem.most_chunk_rows = int(most_chunk_rows);
  problem.x_direct = is_chunked_hopper(problem) && !call.x2 && is_direct(call.x, call.normalize);
  problem.y_direct = is_chunked_hopper(problem) && call.y && is_direct(*call.y, call.normalize);
  const Tensor workspace = at::empty({int64_t(workspace_bytes(problem))}, options.dtype(at::kByte));
  problem.workspace = workspace.mutable_data_ptr();

  if (is_fused(problem))
    launch_pairwise_bce(problem, stream);
  else
    run_chunked(problem, call, workspace, dx, dy, stream);
  return {loss, stats, dx, dy, dparams};
}

}  // namespace mio_ext
