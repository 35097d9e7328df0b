// SPDX-License-Identifier: Apache-2.0
// What pairwise_bce_cuda_test.cpp hands the kernels: memory, random features, and one run of a problem; in the
// emulator, or on a GPU when compiled by nvcc.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/launch.h"
#include "cuda/tile.h"
#include "double_loop.h"

namespace mio_ext {

// Anything that CUDA does not call a success ends the case.
#if defined(__CUDACC__)
inline void check_device(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
// What is launched has run, and well. An error that is still there afterwards is one for good.
inline void wait_for_device() { check_device(cudaGetLastError()), check_device(cudaDeviceSynchronize()); }
inline bool device_is_lost() { return cudaGetLastError(), cudaDeviceSynchronize() != cudaSuccess; }
#else
inline void wait_for_device() {}
inline bool device_is_lost() { return false; }
#endif

// Device memory; writing past its end is a fault in the emulator, and compute-sanitizer's business on a GPU.
class Buffer {
 public:
#if defined(__CUDACC__)
  explicit Buffer(size_t bytes, size_t = 16) : bytes_(bytes) {
    check_device(cudaMalloc(&data_, bytes));
    check_device(cudaMemset(data_, 0xff, bytes));
  }
  ~Buffer() { cudaFree(data_); }
  void* data() const { return data_; }
  void put(const void* from) { check_device(cudaMemcpy(data_, from, bytes_, cudaMemcpyHostToDevice)); }
  void get(void* to) const { check_device(cudaMemcpy(to, data_, bytes_, cudaMemcpyDeviceToHost)); }
#else
  explicit Buffer(size_t bytes, size_t alignment = 16) : bytes_(bytes), memory_(bytes, alignment) {}
  void* data() const { return memory_.data(); }
  void put(const void* from) { std::memcpy(data(), from, bytes_); }
  void get(void* to) const { std::memcpy(to, data(), bytes_); }
#endif
  Buffer(const Buffer&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }

 private:
  size_t bytes_;
#if defined(__CUDACC__)
  void* data_ = nullptr;
#else
  emulator::Guarded memory_;
#endif
};

struct Type {
  Arithmetic arithmetic;
  const char* name;
  int bytes;
  // Of the loss; of the gradient before it is rounded to the features' type: what the coefficients lose.
  double loss_limit, gradient_limit;
};
constexpr Type kTypes[] = {{Arithmetic::kBf16, "bf16", 2, 1e-6, 3e-3},
                           {Arithmetic::kFp16, "fp16", 2, 1e-6, 4e-4},
                           {Arithmetic::kTf32, "tf32", 4, 1e-4, 1e-3},
                           {Arithmetic::kFp16x3, "fp16x3", 4, 1e-6, 3e-6}};

inline uint16_t narrow(Arithmetic to, float v) {
  uint16_t bits;
  if (to == Arithmetic::kFp16) {
    const _Float16 h = _Float16(v);
    std::memcpy(&bits, &h, 2);
  } else {
    uint32_t wide;
    std::memcpy(&wide, &v, 4);
    bits = uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  return bits;
}
inline double widen(Arithmetic from, uint16_t bits) {
  if (from == Arithmetic::kFp16) {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return double(h);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float v;
  std::memcpy(&v, &wide, 4);
  return v;
}

// Random features as the device has them, every `stride`th column of a wider matrix, and what they are in float64.
struct Input {
  std::vector<double> values;
  std::vector<unsigned char> raw;
  int bytes, stride;
  Buffer buffer;
  Features features;

  Input(const Type& type, int64_t n, int64_t d, int stride, unsigned seed)
      : values(random_matrix(n, d, seed)),
        raw(size_t(n * d * stride * type.bytes), 0xff),
        bytes(type.bytes),
        stride(stride),
        buffer(raw.size(), 16) {
    for (size_t i = 0; i < values.size(); ++i) {
      const float v = float(values[i] * std::exp2(double(i / size_t(d) % 7) - 3));  // rows of different norms
      values[i] = v;
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      if (type.bytes == 2) {
        bits = narrow(type.arithmetic, v);
        values[i] = widen(type.arithmetic, uint16_t(bits));
      }
      set(int64_t(i), bits);
    }
    buffer.put(raw.data());
    features = {buffer.data(), d * stride, stride};
  }
  void put(int64_t at, uint32_t bits) {
    set(at, bits);
    buffer.put(raw.data());
  }

 private:
  void set(int64_t at, uint32_t bits) { std::memcpy(&raw[size_t(at * stride * bytes)], &bits, size_t(bytes)); }
};

struct Outputs {
  float loss;
  std::vector<float> dx, dy;
  std::vector<double> stats;
  std::vector<float> dparams;
  bool operator==(const Outputs& o) const { return loss == o.loss && dx == o.dx && dy == o.dy; }
};

struct Options {
  int multiprocessors = 1;
  bool hopper = false;
  bool variant = false;  // the six numbers in a tensor, the rows in two, gradients at an odd address
  bool want_dx = true;
  int most_chunk_rows = 1 << 20;
};

// Device memory as numbers of float64: float32, or 16 bits of the features' type.
inline std::vector<double> read(const Type& type, const void* from, int64_t count, int bytes) {
  std::vector<unsigned char> raw(size_t(count * bytes));
#if defined(__CUDACC__)
  check_device(cudaMemcpy(raw.data(), from, raw.size(), cudaMemcpyDeviceToHost));
#else
  std::memcpy(raw.data(), from, raw.size());
#endif
  std::vector<double> numbers(static_cast<size_t>(count));
  for (size_t i = 0; i < numbers.size(); ++i) {
    float v;
    uint16_t half;
    bytes == 4 ? std::memcpy(&v, &raw[4 * i], 4) : std::memcpy(&half, &raw[2 * i], 2);
    numbers[i] = bytes == 4 ? v : widen(type.arithmetic, half);
  }
  return numbers;
}
inline void write(void* to, const std::vector<float>& numbers) {
#if defined(__CUDACC__)
  check_device(cudaMemcpy(to, numbers.data(), numbers.size() * 4, cudaMemcpyHostToDevice));
#else
  std::memcpy(to, numbers.data(), numbers.size() * 4);
#endif
}

// As host.h does, with the library's products on the host.
inline void run_chunked(const PairwiseBCECuda& p, const Type& type) {
  const ChunkedCopies copies = chunked_copies(p);
  const auto* start = static_cast<const unsigned char*>(p.workspace);
  const int chunk = chunk_rows(p);
  Buffer g_buffer(size_t(chunk) * size_t(copies.k_pad) * 2, 256);
  const bool grad = p.dx || p.dy;
  launch_chunked_prepare(p, nullptr);
  wait_for_device();
  const bool symmetric = !p.y.data;
  auto features = [&](bool wanted, bool direct, const Features& z, size_t at, int rows) {
    if (!wanted) return std::vector<double>();
    return direct ? read(type, z.data, int64_t(rows) * p.d, 2)
                  : read(type, start + at, int64_t(rows) * copies.width, 2);
  };
  const bool y_direct = symmetric ? p.x_direct : p.y_direct;
  const std::vector<double> x = features(p.dy, p.x_direct, p.x, copies.x, p.m);
  const std::vector<double> y = features(p.dx, y_direct, symmetric ? p.x : p.y, copies.y, p.k);
  const int64_t x_stride = p.x_direct ? p.d : copies.width, y_stride = y_direct ? p.d : copies.width;
  std::vector<double> dy(p.dy ? size_t(p.k) * size_t(p.d) : 0);
  for (int row0 = 0; row0 < p.m; row0 += chunk) {
    const int n = p.m - row0 < chunk ? p.m - row0 : chunk;
    launch_chunked_logits(p, grad ? g_buffer.data() : nullptr, row0, n, nullptr);
    wait_for_device();
    const std::vector<double> g = grad ? read(type, g_buffer.data(), int64_t(n) * copies.k_pad, 2) : dy;
    std::vector<float> dx(size_t(n) * size_t(p.d));
    for (int i = 0; i < n; ++i) {
      std::vector<double> row(size_t(p.d), 0.0);
      for (int j = 0; j < p.k && grad; ++j) {
        const double g_ij = g[size_t(i) * size_t(copies.k_pad) + size_t(j)];
        for (int f = 0; f < p.d && p.dx; ++f) row[size_t(f)] += g_ij * y[size_t(j * y_stride + f)];
        for (int f = 0; f < p.d && p.dy; ++f)
          dy[size_t(j) * size_t(p.d) + size_t(f)] += g_ij * x[size_t((row0 + i) * x_stride + f)];
      }
      for (int f = 0; f < p.d; ++f) dx[size_t(i) * size_t(p.d) + size_t(f)] = float(row[size_t(f)]);
    }
    if (p.dx) write(p.dx + int64_t(row0) * p.d, dx);
  }
  if (p.dy) write(p.dy, std::vector<float>(dy.begin(), dy.end()));
  launch_chunked_project(p, nullptr);
}

inline Outputs run(const Type& type, const Case& c, const LossParams& params, const Input& x, const Input& y,
                   const std::vector<int64_t>& x_ids, const std::vector<int64_t>& y_ids, const Options& options) {
  const int64_t k = c.k ? c.k : c.m, odd = options.variant;
  Outputs out{0, std::vector<float>(c.m * c.d), std::vector<float>(c.k * c.d), std::vector<double>(8),
              std::vector<float>(6)};
  std::vector<float> dx_with_odd(out.dx.size() + odd), dy_with_odd(out.dy.size() + odd);
  const size_t alignment = c.d % 4 == 0 || odd ? 16 : 4;  // 4: the buffer ends where its memory does
  Buffer loss(4, 4), stats(64, 8), dx(dx_with_odd.size() * 4, alignment), dy(dy_with_odd.size() * 4 + 4, alignment),
      x_id(c.m * 8, 8), y_id(k * 8, 8), numbers(24, 4), dparams(24, 4);
  x_id.put(x_ids.data()), y_id.put(y_ids.data());
  const float values[6] = {float(params.scale_p),  float(params.scale_n),  float(params.bias),
                           float(params.weight_p), float(params.weight_n), float(params.weight_l)};
  numbers.put(values);
  PairwiseBCECuda p{};
  p.arithmetic = type.arithmetic;
  p.x = x.features;
  if (c.k) p.y = y.features;
  p.x_ids = c.ids ? x_id.as<int64_t>() : nullptr;
  p.y_ids = c.ids && c.k ? y_id.as<int64_t>() : nullptr;
  p.x_rows = int(c.m);
  if (options.variant && c.m > 1) {
    p.x_rows = int(c.m / 2);
    p.x2 = p.x;
    p.x2.data = static_cast<const unsigned char*>(p.x.data) + p.x_rows * p.x.row_stride * type.bytes;
  }
  p.m = int(c.m), p.k = int(k), p.d = int(c.d);
  p.shift = int(c.shift), p.offset = int(c.offset);
  p.exclude_self = c.exclude_self, p.normalize = c.normalize;
  p.params = options.variant ? numbers.as<float>() : nullptr;
  p.constants = params;
  p.loss = loss.as<float>(), p.stats = stats.as<double>();
  p.dx = options.want_dx ? dx.as<float>() + odd : nullptr, p.dy = c.k ? dy.as<float>() + odd : nullptr;
  p.dparams = dparams.as<float>();
  p.multiprocessors = options.multiprocessors;
  p.hopper = options.hopper;
  p.most_chunk_rows = options.most_chunk_rows;
  const bool direct = p.hopper && !c.normalize && c.d % 8 == 0 && x.features.col_stride == 1;
  p.x_direct = direct && p.x_rows == p.m, p.y_direct = direct && c.k;
  Buffer workspace(workspace_bytes(p), 256);
  p.workspace = workspace.data();
  is_fused(p) ? launch_pairwise_bce(p, nullptr) : run_chunked(p, type);
  wait_for_device();
  loss.get(&out.loss), stats.get(out.stats.data()), dparams.get(out.dparams.data()), dx.get(dx_with_odd.data());
  std::copy(dx_with_odd.begin() + odd, dx_with_odd.end(), out.dx.begin());
  if (c.k) {
    std::vector<float> with_end(dy_with_odd.size() + 1);
    dy.get(with_end.data());
    std::copy(with_end.begin() + odd, with_end.end() - 1, out.dy.begin());
  }
  return out;
}

}  // namespace mio_ext
