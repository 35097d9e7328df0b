// SPDX-License-Identifier: Apache-2.0
// The schemas of mio_ext's ops, and the contract behind them. Implementations register themselves in csrc/<device>/;
// the fake implementation is in mio_ext/ops.py, the gradient in mio_ext/gradient.py.
#include <string>

#include "call.h"

namespace mio_ext {
namespace {

void only_check(const Call&) {}  // from_dispatcher() has
std::string version() { return MIO_VERSION; }

}  // namespace

MIO_LIBRARY(MIO_OPS, m) {
  // Eq. (11)-(12) of mio_ext/reference.py, its gradients and its statistics in one pass.
  //
  // y: None means y = x; the gradient of both roles is then in dx.
  // x_ids, y_ids: int64 [M], [K]; equal ids are positive pairs. None: the positive column of row i is
  //     offset + (i + shift) mod M. y_ids is None where y is.
  // shift, offset: in [0, M) and from 0 up; without y and ids positives must be mutual, so shift is 0 or
  //     M/2, and offset is 0.
  // params: (a_p, a_n, b, w_p, w_n, w_l) as a tensor [6] of the loss's dtype on x's device, never
  //     read by the host; None: the same six numbers are in `constants`, which is empty otherwise.
  //     A scale a that is not positive and finite makes the loss NaN. w_l must be 0 without normalize.
  // needs_grad: for x, y and params; what requires a gradient gets one anyway.
  // x2: more rows of x, which follow its own; M, ids and dx are of all of them.
  // tf32: on a GPU products of float32 may be TF32's, as torch.set_float32_matmul_precision() says; the stable ABI has
  //     no getter for that.
  //
  // loss, dparams [6]: float32, float64 for float64 inputs. dx [M, D], dy [K, D]: the same, so that a
  //     16-bit gradient is rounded once, after grad_output; empty where not needed.
  // stats: float64 [8], the fields of reference.PairStats.
  const std::string arguments = kArguments;
  m.def(("pairwise_bce" + arguments + kOutputs).c_str());
  // The same op in Triton; mio_ext/ops.py registers its implementation.
  m.def(("pairwise_bce_triton" + arguments + kOutputs).c_str());
  // What every implementation asks of its arguments, for those that are not in C++.
  m.def(("check_inputs" + arguments + "()").c_str());
  // out += a b, in out's type. mio_ext/ops.py has it, for csrc/cuda/host.h: the stable ABI cannot call
  // addmm, which takes two Scalars.
  m.def("add_product(Tensor(a!) out, Tensor a, Tensor b) -> ()");
  // Of the package that this library was built in.
  m.def("version() -> str");
}

MIO_LIBRARY_IMPL(MIO_OPS, CompositeExplicitAutograd, m) {
  m.impl("check_inputs", TORCH_BOX(&from_dispatcher<only_check>));
  m.impl("version", TORCH_BOX(&version));
}

}  // namespace mio_ext

#if defined(REGISTER_EXTENSION)
REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
#endif
