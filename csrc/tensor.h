// SPDX-License-Identifier: Apache-2.0
// What is needed of torch beyond the kernels, all of it from its stable ABI: a library built with one torch runs with
// every later one. TORCH_TARGET_VERSION (setup.py) says which is the oldest.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>

// The namespace of the ops. Hugging Face's kernel-builder (build.toml) has one for each build, so that several can be
// loaded at a time, and a header that says so.
#if __has_include("registration.h")
#include "registration.h"
#define MIO_OPS TORCH_EXTENSION_NAME
#define MIO_VERSION ""
#elif !defined(MIO_OPS)
#define MIO_OPS mio_ext
#endif
#define MIO_LIBRARY(ops, m) STABLE_TORCH_LIBRARY(ops, m)  // with MIO_OPS spelt out
#define MIO_LIBRARY_FRAGMENT(ops, m) STABLE_TORCH_LIBRARY_FRAGMENT(ops, m)
#define MIO_LIBRARY_IMPL(ops, key, m) STABLE_TORCH_LIBRARY_IMPL(ops, key, m)

namespace mio_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The stable ABI has one kind of exception, which reaches Python as a RuntimeError; mio_ext/gradient.py makes a
// ValueError of those that begin with this.
inline constexpr char kAboutArguments[] = "pairwise_bce: ";

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}
#define MIO_CHECK(condition, ...) \
  if (!(condition)) fail(kAboutArguments, __VA_ARGS__)

// In a message: [3, 4], and cuda:1.
struct SizesOf {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& to, const SizesOf& of) {
    to << '[';
    for (int64_t i = 0; i < of.tensor.dim(); ++i) to << (i ? ", " : "") << of.tensor.size(i);
    return to << ']';
  }
};
struct DeviceOf {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& to, const DeviceOf& of) {
    const torch::stable::Device device = of.tensor.device();
    if (device.is_cpu()) return to << "cpu";
    return to << (device.is_cuda() ? "cuda" : "device") << ':' << device.index();
  }
};

// Not initialised, on the device of `like`.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  int64_t strides[2] = {1, 1}, count = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= sizes.begin()[i]) strides[i] = count;
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  if (aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype, device, like.get_device_index(),
                               &made) != AOTI_TORCH_SUCCESS)
    fail("out of memory: pairwise_bce cannot allocate memory for ", count, " numbers of type ", type, " on ",
         DeviceOf{like});
  return Tensor(made);
}

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// f of what there is.
template <class F>
std::optional<Tensor> map(const std::optional<Tensor>& t, const F& f) {
  return t ? std::optional<Tensor>(f(*t)) : std::nullopt;
}

}  // namespace mio_ext
