// SPDX-License-Identifier: Apache-2.0
// The op on tensors of any device whose kernels are linked: allocate, choose the path, launch. pairwise_bce.cpp has
// it run on a GPU; the tests, on the CPU with the kernels in an emulator. Nothing here waits for the device.
#pragma once

#include <algorithm>
#include <array>

#include "../call.h"
#include "launch.h"

namespace mio_ext {

inline Arithmetic arithmetic_of(const Call& call) {
  if (call.x.scalar_type() == ScalarType::BFloat16) return Arithmetic::kBf16;
  if (call.x.scalar_type() == ScalarType::Half) return Arithmetic::kFp16;
  if (call.d() > kMaxFusedFeatures) return Arithmetic::kFp32;
  return call.tf32 ? Arithmetic::kTf32 : Arithmetic::kFp16x3;
}

inline void check_supported(const Call& call) {
  MIO_CHECK(call.x.scalar_type() != ScalarType::Double,
            "backend 'cuda' takes float32, bfloat16 and float16, got float64; use backend='triton' or 'reference'");
  MIO_CHECK(call.m() <= kMaxRows && call.k() <= kMaxRows, "backend 'cuda' takes up to ", kMaxRows, " rows, got ",
            call.m(), " and ", call.k());
}

template <class... Arguments>
Tensor dispatch(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline void add_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(out), torch::stable::detail::from(a),
                                    torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(C10_STRINGIZE(MIO_OPS) "::add_product", "", stack.data(), TORCH_ABI_VERSION));
}

// out = a b, or out += a b, in out's type, which for 16-bit operands is float32. Autocast changes no product that has
// an `out`.
inline void product_into(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  const ScalarType type = out.scalar_type();
  if (accumulate)
    add_product(out, a, b);
  else if (a.scalar_type() == type)
    dispatch("aten::mm", "out", a, b, out);
  else if (a.is_cuda())
    dispatch("aten::mm", "dtype_out", a, b, type, out);
  else  // no such product on the CPU
    product_into(out, torch::stable::to(a, type), torch::stable::to(b, type), accumulate);
}

// Products with an `out` refuse features that require grad, unless gradients are off.
class WithoutGradients {
 public:
  WithoutGradients() : enabled_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~WithoutGradients() { aoti_torch_grad_mode_set_enabled(enabled_); }
  WithoutGradients(const WithoutGradients&) = delete;
  WithoutGradients& operator=(const WithoutGradients&) = delete;

 private:
  bool enabled_;
};

// Whether a library multiplies as well by the rows as they come as by a copy; which, without normalize, has no others.
inline bool is_direct(const Tensor& z, bool normalize) {
  return !normalize && z.stride(1) == 1 && z.stride(0) % 8 == 0 && z.stride(0) >= z.size(1) &&
         reinterpret_cast<uintptr_t>(z.const_data_ptr()) % 16 == 0;
}

inline Tensor rows(Tensor t, int64_t first, int64_t n) { return torch::stable::narrow(t, 0, first, n); }
inline Tensor columns(Tensor t, int64_t n) { return torch::stable::narrow(t, 1, 0, n); }
inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// Memory of O(chunk K). Units of 2 M K D operations: 2 without y, else 1 and one for each gradient.
inline void run_chunked(const PairwiseBCECuda& problem, const Call& call, const Tensor& workspace, const Tensor& dx,
                        const Tensor& dy, Stream stream) {
  const WithoutGradients no_gradients;
  const ScalarType type = call.x.scalar_type();
  const ChunkedCopies copies = chunked_copies(problem);
  auto copy = [&](size_t start, int64_t n) {
    const Tensor bytes = rows(workspace, int64_t(start), n * copies.width * int64_t(call.x.element_size()));
    return torch::stable::view(torch::stable::view(bytes, type), {n, copies.width});
  };
  // For the gradients. The first product takes the whole width, of the copies.
  auto right = [&](bool direct, const Tensor& z, size_t start, int64_t rows) {
    return direct ? z : columns(copy(start, rows), problem.d);
  };
  const bool logits = has_chunked_logits(problem);
  std::optional<Tensor> x, y, products, g;
  if (problem.dy) x = right(problem.x_direct, call.x, copies.x, copies.m_pad);
  if (problem.dx)
    y = call.y ? right(problem.y_direct, *call.y, copies.y, copies.k_pad)
               : right(problem.x_direct, call.x, copies.x, copies.k_pad);
  const int64_t chunk = chunk_rows(problem);
  if (!logits) {
    g = products = empty({chunk, copies.k_pad}, ScalarType::Float, call.x);
  } else if (problem.dx || problem.dy) {
    g = empty({chunk, copies.k_pad}, type, call.x);
  }
  launch_chunked_prepare(problem, stream);
  for (int64_t row0 = 0; row0 < problem.m; row0 += chunk) {
    const int64_t n = std::min(chunk, problem.m - row0);
    if (logits) {
      launch_chunked_logits(problem, g ? g->mutable_data_ptr() : nullptr, int(row0), int(n), stream);
    } else {
      const Tensor some = rows(*products, 0, n);
      product_into(some, rows(copy(copies.x, copies.m_pad), row0, n), transposed(copy(copies.y, copies.k_pad)),
                   false);  // (2), but for the norms
      launch_chunked_terms(problem, products->mutable_data_ptr<float>(), int(row0), int(n), stream);
    }
    if (problem.dx) product_into(rows(dx, row0, n), columns(rows(*g, 0, n), y->size(0)), *y, false);  // (9)
    if (problem.dy) product_into(dy, transposed(columns(rows(*g, 0, n), problem.k)), rows(*x, row0, n), row0 > 0);
  }
  launch_chunked_project(problem, stream);
}

inline Outputs run_pairwise_bce(const Call& call, int multiprocessors, bool hopper, int64_t most_chunk_rows,
                                Stream stream) {
  const int64_t m = call.m(), k = call.k(), d = call.d();
  const std::optional<Tensor> x_ids = map(call.x_ids, packed), y_ids = map(call.y_ids, packed),
                              params = map(call.params, packed);
  const auto& needs = call.needs_grad;
  auto made = [&](std::initializer_list<int64_t> sizes) { return empty(sizes, ScalarType::Float, call.x); };
  const Tensor loss = made({}), stats = empty({8}, ScalarType::Double, call.x);
  const Tensor dx = needs[0] ? made({m, d}) : made({0}), dy = needs[1] ? made({k, d}) : made({0});
  const Tensor dparams = made({needs[2] ? 6 : 0});

  auto features = [](const Tensor& t) { return Features{t.const_data_ptr(), t.stride(0), t.stride(1)}; };
  PairwiseBCECuda problem{};
  problem.arithmetic = arithmetic_of(call);
  problem.x = features(call.x);
  problem.x_rows = int(call.x.size(0));
  if (call.x2) problem.x2 = features(*call.x2);
  if (call.y) problem.y = features(*call.y);
  problem.x_ids = x_ids ? x_ids->const_data_ptr<int64_t>() : nullptr;
  problem.y_ids = y_ids ? y_ids->const_data_ptr<int64_t>() : nullptr;
  problem.m = int(m);
  problem.k = int(k);
  problem.d = int(d);
  problem.shift = int(call.shift);
  problem.offset = int(std::min(call.offset, k));  // past the last column is past it
  problem.exclude_self = call.exclude_self;
  problem.normalize = call.normalize;
  problem.params = params ? params->const_data_ptr<float>() : nullptr;
  if (!call.params) {
    const auto& c = call.constants;
    problem.constants = {c[0], c[1], c[2], c[3], c[4], c[5]};
  }
  problem.loss = loss.mutable_data_ptr<float>();
  problem.stats = stats.mutable_data_ptr<double>();
  problem.dx = needs[0] ? dx.mutable_data_ptr<float>() : nullptr;
  problem.dy = needs[1] ? dy.mutable_data_ptr<float>() : nullptr;
  problem.dparams = needs[2] ? dparams.mutable_data_ptr<float>() : nullptr;
  problem.multiprocessors = multiprocessors;
  problem.hopper = hopper;
  problem.most_chunk_rows = int(most_chunk_rows);
  problem.x_direct = is_chunked_hopper(problem) && !call.x2 && is_direct(call.x, call.normalize);
  problem.y_direct = is_chunked_hopper(problem) && call.y && is_direct(*call.y, call.normalize);
  const Tensor workspace = empty({int64_t(workspace_bytes(problem))}, ScalarType::Byte, call.x);
  problem.workspace = workspace.mutable_data_ptr();

  if (is_fused(problem))
    launch_pairwise_bce(problem, stream);
  else
    run_chunked(problem, call, workspace, dx, dy, stream);
  return {loss, stats, dx, dy, dparams};
}

}  // namespace mio_ext
