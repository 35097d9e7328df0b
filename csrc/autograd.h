// SPDX-License-Identifier: Apache-2.0
// The gradient of the op, on the op itself: whatever calls it meets this, whether through mio_ext/ops.py, a compiler,
// an exported graph or torch.func. The gradient is made along with the loss; the backward pass only scales it.
//
// dx, dy and dparams are outputs that have a history: to differentiate the gradient is to ask for theirs, and is
// refused. So a second derivative is never silently zero, however the first was taken.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <utility>

#include "call.h"

namespace mio_ext {

using OpSignature = Outputs(const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, at::ArrayRef<double>,
                            c10::SymInt, c10::SymInt, bool, bool, std::array<bool, 3>,
                            const std::optional<at::Tensor>&);

inline bool in_function_transform() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// Takes the state of function transforms away from this thread until back() or the end. torch keeps its C++ autograd
// functions from transforms, for as a rule they are called above the dispatcher, where several levels are still to
// come. This one is called by the dispatcher, once for each level and with its tensors.
class WithoutTransforms {
 public:
  WithoutTransforms() : state_(std::move(at::functorch::functorchTLSAccessor())) {}
  ~WithoutTransforms() { back(); }
  WithoutTransforms(const WithoutTransforms&) = delete;
  WithoutTransforms& operator=(const WithoutTransforms&) = delete;
  void back() {
    if (state_) at::functorch::functorchTLSAccessor() = std::move(state_);
  }

 private:
  std::unique_ptr<at::functorch::FuncTorchTLSBase> state_;
};

// Rounded to 16 bits only after the product: a loss scale must be able to save small gradients.
inline at::Tensor scaled(const at::Tensor& gradient, const at::Tensor& by, at::ScalarType type) {
  if (gradient.scalar_type() == type) return gradient * by;
  // One kernel launch, where nobody differentiates, batches or traces it.
  constexpr c10::DispatchKeySet others({c10::DispatchKey::Python, c10::DispatchKey::Batched});
  if (at::GradMode::is_enabled() || in_function_transform() || (gradient.key_set() | by.key_set()).has_any(others))
    return (gradient * by).to(type);
  at::Tensor out = at::empty_like(gradient, gradient.options().dtype(type));
  return at::mul_out(out, gradient, by);
}

struct PairwiseBCEFunction : torch::autograd::Function<PairwiseBCEFunction> {
  static constexpr bool is_traceable = true;

  // run() calls the op below autograd and returns (loss, dx, dy, dparams).
  template <class Run>
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                                                const std::optional<at::Tensor>& x2, const std::optional<at::Tensor>& y,
                                                const std::optional<at::Tensor>& params, const Run& run) {
    torch::autograd::variable_list outputs = run();
    ctx->save_for_backward({outputs[1], outputs[2], outputs[3]});
    ctx->saved_data["type"] = int64_t(x.scalar_type());
    ctx->saved_data["rows"] = x.sym_size(0);
    ctx->saved_data["x2"] = x2.has_value();
    ctx->saved_data["y"] = y.has_value();
    ctx->saved_data["params"] = params.has_value();
    ctx->saved_data["transform"] = in_function_transform();
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    // In torch.func.grad and its like gradients are always on; there the history has to say it.
    const bool second = grads[1].defined() || grads[2].defined() || grads[3].defined() ||
                        (at::GradMode::is_enabled() && !ctx->saved_data["transform"].toBool());
    TORCH_CHECK(!second,
                "pairwise_bce: a fused backend has no second derivative; pass backend='reference' for "
                "create_graph=True");
    enum { kX, kX2, kY, kParams, kRun, kInputs };
    torch::autograd::variable_list result(kInputs);
    const at::Tensor& by = grads[0];
    if (!by.defined()) return result;
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    const auto type = at::ScalarType(ctx->saved_data["type"].toInt());
    size_t edge = 0;  // of the inputs that are tensors
    const bool needs_x = ctx->needs_input_grad(edge++);
    if (ctx->saved_data["x2"].toBool()) {
      // A storage of its own for each: whoever keeps or saves one must not keep both.
      const c10::SymInt rows = ctx->saved_data["rows"].toSymInt(), end = saved[0].sym_size(0);
      if (needs_x) result[kX] = scaled(saved[0].slice_symint(0, 0, rows), by, type);
      if (ctx->needs_input_grad(edge++)) result[kX2] = scaled(saved[0].slice_symint(0, rows, end), by, type);
    } else if (needs_x) {
      result[kX] = scaled(saved[0], by, type);
    }
    if (ctx->saved_data["y"].toBool() && ctx->needs_input_grad(edge++)) result[kY] = scaled(saved[1], by, type);
    if (ctx->saved_data["params"].toBool() && ctx->needs_input_grad(edge++)) result[kParams] = saved[2] * by;
    return result;
  }
};

// What the dispatcher calls before any implementation of the op called kName. It sees what requires a gradient at its
// own level, so it is what asks the implementation for one; callers need not.
template <const char* kName>
Outputs differentiable(c10::DispatchKeySet keys, const at::Tensor& x, const std::optional<at::Tensor>& y,
                       const std::optional<at::Tensor>& x_ids, const std::optional<at::Tensor>& y_ids,
                       const std::optional<at::Tensor>& params, at::ArrayRef<double> constants, c10::SymInt shift,
                       c10::SymInt offset, bool exclude_self, bool normalize, std::array<bool, 3> needs_grad,
                       const std::optional<at::Tensor>& x2) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kName, "").typed<OpSignature>();
  auto run = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_autograd_keyset, x, y, x_ids, y_ids, params, constants, shift, offset,
                         exclude_self, normalize, needs_grad, x2);
  };
  auto has_tangent = [](const std::optional<at::Tensor>& t) { return t && t->_fw_grad(/*level=*/0).defined(); };
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(x) || has_tangent(x2) || has_tangent(y) || has_tangent(params)),
                              "pairwise_bce: a fused backend has no forward-mode derivative; pass "
                              "backend='reference' for torch.func.jvp, jacfwd or hessian");
  auto requires_grad = [](const std::optional<at::Tensor>& t) { return t && t->requires_grad(); };
  const bool of_x = x.requires_grad() || requires_grad(x2), of_y = requires_grad(y), of_params = requires_grad(params);
  if (!at::GradMode::is_enabled() || !(of_x || of_y || of_params)) return run();
  needs_grad = {needs_grad[0] || of_x, needs_grad[1] || of_y, needs_grad[2] || of_params};
  at::Tensor stats;  // has no gradient
  WithoutTransforms without;
  auto o = PairwiseBCEFunction::apply(x, x2, y, params, [&]() -> torch::autograd::variable_list {
    without.back();
    const at::AutoGradMode for_the_next_level(in_function_transform());
    auto [loss, statistics, dx, dy, dparams] = run();
    stats = statistics;
    return {loss, dx, dy, dparams};
  });
  return {o[0], stats, o[1], o[2], o[3]};
}

}  // namespace mio_ext
