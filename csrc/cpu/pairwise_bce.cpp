// SPDX-License-Identifier: Apache-2.0
// CPU implementation of the op: allocate, run the kernel, round to the op's types.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../call.h"
#include "pairwise_bce_cpu.h"

namespace mio_ext {
namespace {

using at::Tensor;

void parallel_on_torch_threads(int n, const std::function<void(int)>& body) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
  });
}

#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__)
void product_by_onednn(int64_t m, int64_t n, int64_t k, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                       float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, 2 * k, 2 * lda, ldb, ldc, accumulate, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}
[[maybe_unused]] const bool known = (library_product = product_by_onednn, true);

// A thread's first product on AMX takes the tiles; they must be given back before anybody else wants them.
void parallel_with_onednn(int n, const std::function<void(int)>& body) {
  TORCH_CHECK(at::globalContext().userEnabledMkldnn(),
              "pairwise_bce: MIO_CPU_ISA=onednn, but torch.backends.mkldnn is disabled");
  parallel_on_torch_threads(n, [&](int i) {
    body(i);
    at::native::cpublas::brgemm_release();
  });
}
#else
constexpr auto parallel_with_onednn = parallel_on_torch_threads;
#endif

double positive_or_nan(double scale) {
  return scale > 0 && scale < std::numeric_limits<double>::infinity() ? scale
                                                                      : std::numeric_limits<double>::quiet_NaN();
}

LossParams loss_params(const Call& call) {
  double v[6];
  const Tensor numbers = call.params ? call.params->to(at::kDouble).contiguous() : Tensor();
  std::copy_n(call.params ? numbers.const_data_ptr<double>() : call.constants.data(), 6, v);
  return {positive_or_nan(v[0]), positive_or_nan(v[1]), v[2], v[3], v[4], v[5]};
}

template <typename T>
Outputs run(const Call& call) {
  constexpr at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  auto dense = [](const Tensor& t) { return t.to(type).contiguous(); };
  const Tensor x = dense(call.x), x2 = call.x2 ? dense(*call.x2) : Tensor(), y = call.y ? dense(*call.y) : Tensor();
  const Tensor x_ids = call.x_ids ? call.x_ids->contiguous() : Tensor();
  const Tensor y_ids = call.y_ids ? call.y_ids->contiguous() : Tensor();

  auto wanted = [](bool needs, at::IntArrayRef sizes) { return at::empty(needs ? sizes : at::IntArrayRef{0}, type); };
  Tensor dx = wanted(call.needs_grad[0], {call.m(), call.d()}), dy = wanted(call.needs_grad[1], {call.k(), call.d()});
  Tensor dparams = wanted(call.needs_grad[2], {6}), loss = at::empty({}, type), stats = at::empty({8}, at::kDouble);

  PairwiseBCE<T> problem{};
  problem.x = x.const_data_ptr<T>();
  problem.x2 = call.x2 ? x2.const_data_ptr<T>() : nullptr;
  problem.x_rows = call.x.size(0);
  problem.y = call.y ? y.const_data_ptr<T>() : nullptr;
  problem.x_ids = call.x_ids ? x_ids.const_data_ptr<int64_t>() : nullptr;
  problem.y_ids = call.y_ids ? y_ids.const_data_ptr<int64_t>() : nullptr;
  problem.m = call.m();
  problem.k = call.k();
  problem.d = call.d();
  problem.shift = call.shift;
  problem.offset = call.offset;
  problem.exclude_self = call.exclude_self;
  problem.bfloat16 = call.x.scalar_type() == at::kBFloat16;
  problem.normalize = call.normalize;
  problem.params = loss_params(call);
  problem.dx = call.needs_grad[0] ? dx.mutable_data_ptr<T>() : nullptr;
  problem.dy = call.needs_grad[1] ? dy.mutable_data_ptr<T>() : nullptr;

  const auto parallel = cpu_instruction_set() == "onednn" ? parallel_with_onednn : parallel_on_torch_threads;
  const PairSums sums = pairwise_bce_cpu(problem, at::get_num_threads(), parallel);

  *loss.mutable_data_ptr<T>() = T(problem.params.loss(sums));
  sums.statistics(stats.mutable_data_ptr<double>());
  if (call.needs_grad[2]) {
    double gradient[6];
    problem.params.gradient(sums, gradient);
    std::copy_n(gradient, 6, dparams.mutable_data_ptr<T>());
  }
  return {loss, stats, dx, dy, dparams};
}

Outputs pairwise_bce(const Call& call) {
  return call.loss_type() == at::kDouble ? run<double>(call) : run<float>(call);
}

}  // namespace

TORCH_LIBRARY_IMPL(mio_ext, CPU, m) { m.impl("pairwise_bce", from_dispatcher<pairwise_bce>); }

}  // namespace mio_ext
