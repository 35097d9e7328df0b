// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels against a plain double loop over pairs, in cuda_emulator.h; compiled by nvcc, on the GPU.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/pairwise_bce_cuda.h"
#include "cuda/pairwise_bce_tile.h"
#include "double_loop.h"

namespace {

using namespace mio_ext;

// Device memory; writing past its end is a fault in the emulator, and compute-sanitizer's business on a GPU.
class Buffer {
 public:
#if defined(__CUDACC__)
  explicit Buffer(size_t bytes, size_t = 16) : bytes_(bytes) {
    cudaMalloc(&data_, bytes);
    cudaMemset(data_, 0xff, bytes);
  }
  ~Buffer() { cudaFree(data_); }
  void* data() const { return data_; }
  void put(const void* from) { cudaMemcpy(data_, from, bytes_, cudaMemcpyHostToDevice); }
  void get(void* to) const { cudaMemcpy(to, data_, bytes_, cudaMemcpyDeviceToHost); }
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
                           {Arithmetic::kFp16x3, "3xfp16", 4, 1e-6, 3e-6}};

uint16_t narrow(Arithmetic to, float v) {
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
double widen(Arithmetic from, uint16_t bits) {
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
  Buffer buffer;
  Features features;

  Input(const Type& type, int64_t n, int64_t d, int stride, unsigned seed)
      : values(random_matrix(n, d, seed)), buffer(size_t(n * d * stride * type.bytes), size_t(type.bytes)) {
    std::vector<unsigned char> raw(size_t(n * d * stride * type.bytes), 0xff);
    for (size_t i = 0; i < values.size(); ++i) {
      const float v = float(values[i] * std::exp2(double(i / size_t(d) % 7) - 3));  // rows of different norms
      values[i] = v;
      if (type.bytes == 4) std::memcpy(&raw[i * size_t(stride) * 4], &v, 4);
      if (type.bytes == 2) {
        const uint16_t bits = narrow(type.arithmetic, v);
        values[i] = widen(type.arithmetic, bits);
        std::memcpy(&raw[i * size_t(stride) * 2], &bits, 2);
      }
    }
    buffer.put(raw.data());
    features = {buffer.data(), d * stride, stride};
  }
  void put(const Type& type, int64_t at, float v) {
    std::vector<unsigned char> raw(values.size() * size_t(type.bytes));
    buffer.get(raw.data());
    const uint16_t bits = type.bytes == 2 ? narrow(type.arithmetic, v) : 0;
    std::memcpy(&raw[size_t(at * type.bytes)], type.bytes == 2 ? static_cast<const void*>(&bits) : &v,
                size_t(type.bytes));
    buffer.put(raw.data());
  }
};

struct Outputs {
  float loss;
  std::vector<float> dx, dy;
  std::vector<double> stats;
  bool operator==(const Outputs& o) const { return loss == o.loss && dx == o.dx && dy == o.dy; }
};

Outputs run(const Type& type, const Case& c, const LossParams& params, const Input& x, const Input& y,
            const std::vector<int64_t>& x_ids, const std::vector<int64_t>& y_ids, int multiprocessors, bool hopper,
            bool in_tensor, bool want_dx = true) {
  const int64_t k = c.k ? c.k : c.m;
  Outputs out{0, std::vector<float>(c.m * c.d), std::vector<float>(c.k * c.d), std::vector<double>(8)};
  Buffer loss(4, 4), stats(64, 8), dx(out.dx.size() * 4, 4), dy(out.dy.size() * 4 + 4, 4), x_id(c.m * 8, 8),
      y_id(k * 8, 8), numbers(24, 4), dparams(24, 4);
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
  if (in_tensor && c.m > 1) {  // the second run has its rows in two
    p.x_rows = int(c.m / 2);
    p.x2 = p.x;
    p.x2.data = static_cast<const unsigned char*>(p.x.data) + p.x_rows * p.x.row_stride * type.bytes;
  }
  p.m = int(c.m), p.k = int(k), p.d = int(c.d);
  p.shift = int(c.shift), p.offset = int(c.offset);
  p.exclude_self = c.exclude_self, p.normalize = c.normalize;
  p.params = in_tensor ? numbers.as<float>() : nullptr;
  p.constants = params;
  p.loss = loss.as<float>(), p.stats = stats.as<double>();
  p.dx = want_dx ? dx.as<float>() : nullptr, p.dy = c.k ? dy.as<float>() : nullptr;
  p.dparams = dparams.as<float>();
  p.multiprocessors = multiprocessors;
  p.hopper = hopper;
  Buffer workspace(workspace_bytes(p), 256);
  p.workspace = workspace.data();
  launch_pairwise_bce(p, nullptr);
  loss.get(&out.loss), stats.get(out.stats.data()), dx.get(out.dx.data());
  if (c.k) {
    std::vector<float> with_end(out.dy.size() + 1);
    dy.get(with_end.data());
    std::copy(with_end.begin(), with_end.end() - 1, out.dy.begin());
  }
  return out;
}

bool check(const Type& type, const Case& c, int multiprocessors, bool hopper) {
  const int64_t k = c.k ? c.k : c.m;
  const int stride = c.d % 2 ? 2 : 1;
  const Input x(type, c.m, c.d, stride, 1), y(type, k, c.d, stride, 2);
  std::vector<int64_t> x_ids(c.m), y_ids(k);
  for (int64_t i = 0; i < c.m; ++i) x_ids[i] = (i * 7 % 5) << 40;
  for (int64_t j = 0; j < k; ++j) y_ids[j] = (j * 3 % 5) << 40;
  // Exact in float32. Logits of one column range stay below TwoBoundedTerms::kBound, those of several do not.
  const LossParams params{4, multiprocessors == 1 ? 1.5 : 3, -0.5, 0.5, 1.0 / 64, c.normalize ? 0.25 : 0.0};
  const Result expected = by_double_loop(c, x.values, y.values, x_ids, y_ids, params);
  const Outputs out = run(type, c, params, x, y, x_ids, y_ids, multiprocessors, hopper, false);
  const Outputs again = run(type, c, params, x, y, x_ids, y_ids, multiprocessors, hopper, true);

  const double loss_error = std::abs(out.loss / expected.loss - 1);
  // At D = 1 eq. (10) leaves no gradient.
  const bool none = c.d == 1 && c.normalize;
  const double dx_error = none ? 0 : relative_distance(out.dx, expected.dx);
  const double dy_error = c.k && !none ? relative_distance(out.dy, expected.dy) : 0;
  const bool same = again == out;  // other blocks came first
  bool alone_good = true;          // dy alone: its sweep makes the loss
  if (c.k) {
    const Outputs alone = run(type, c, params, x, y, x_ids, y_ids, multiprocessors, hopper, false, false);
    alone_good = std::abs(alone.loss / expected.loss - 1) < type.loss_limit &&
                 (none || relative_distance(alone.dy, expected.dy) < type.gradient_limit);
  }
  // Written so that NaN fails.
  const bool good = loss_error < type.loss_limit && alone_good && dx_error < type.gradient_limit &&
                    dy_error < type.gradient_limit && same;
  if (!good || std::getenv("MIO_VERBOSE"))
    std::printf("%s %s%s m=%ld k=%ld d=%ld ids=%d, %d multiprocessors: loss %.1e dx %.1e dy %.1e%s%s\n",
                good ? "ok" : "FAILED", type.name, hopper ? " hopper" : "", long(c.m), long(c.k), long(c.d), c.ids,
                multiprocessors, loss_error, dx_error, dy_error, same ? "" : ", other bits in other order",
                alone_good ? "" : ", dy alone is wrong");
  return good;
}

// One feature that is not finite, of a column that is nobody's positive and crossed by no diagonal.
bool check_not_finite(const Type& type, bool hopper, float value) {
  const Case c{40, 600, 64, 0, 0, false, true, false};
  const Input x(type, c.m, c.d, 1, 1);
  Input y(type, c.k, c.d, 1, 2);
  y.put(type, 400 * c.d, value);
  bool good = true;
  for (double scale : {1.0, 3.0}) {  // below TwoBoundedTerms::kBound, and not
    const LossParams params{scale, scale, 0, 0.5, 1.0 / 64, 0};
    const Outputs out =
        run(type, c, params, x, y, std::vector<int64_t>(c.m), std::vector<int64_t>(c.k), 1, hopper, false);
    good = good && std::isnan(out.loss) && std::isnan(out.stats[3]) && std::isnan(out.dx[0]);
  }
  if (!good) std::printf("FAILED %s%s: %f in a feature is lost\n", type.name, hopper ? " hopper" : "", double(value));
  return good;
}

bool has_hopper() {
#if defined(__CUDACC__)
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return hopper_is_built() && major == 9 && minor == 0;
#else
  return true;
#endif
}

// special columns against the definition, for every row; cross() may only err on the safe side.
bool check_pairs(const Pairs& p) {
  bool good = true;
  const int rows = p.transposed ? p.k : p.m, cols = p.transposed ? p.m : p.k;
  for (int r = 0; r < rows; ++r)
    for (int col = 0; col < cols; ++col) {
      const int i = p.transposed ? col : r, j = p.transposed ? r : col;
      const bool own = p.exclude_self && j == p.offset + i;
      const bool positive = !own && j == p.offset + (i + p.shift) % p.m;
      good = good && (p.own(r) == col) == own && (p.positive(r) == col) == positive;
      if (own || positive) good = good && p.cross(r / 16 * 16, 16, col / 8 * 8, 8);
    }
  if (!good) std::printf("FAILED pairs m=%d k=%d shift=%d offset=%d\n", p.m, p.k, p.shift, p.offset);
  return good;
}

bool check_maps() {
  bool good = true;
  for (int m : {1, 5, 40})
    for (int k : {1, 7, 40, 90})
      for (int shift : {0, m / 2, m - 1})
        for (int offset : {0, 3, 50, k})
          for (int flags = 0; flags < 4; ++flags)
            good = check_pairs({m, k, shift, offset < k ? offset : k, flags % 2 == 1, flags / 2 == 1}) && good;
  for (uint32_t bytes : {128u, 256u, 512u, 1024u}) {
    std::vector<bool> seen(16 * bytes / 16);
    for (uint32_t row = 0; row < 16; ++row)
      for (uint32_t chunk = 0; chunk < bytes / 16; ++chunk) {
        const uint32_t at = swizzled(row, chunk, bytes);
        good = good && at % 16 == 0 && at < 16 * bytes && !seen[at / 16];
        good = good && at == along(swizzled(row, chunk & 1, bytes), chunk & ~1u);
        seen[at / 16] = true;
      }
  }
  // Tiled rows: each place once, and what the hardware's swizzle, address bits 7-9 on bits 4-6, makes of plain blocks.
  for (int width : {64, 128, 256}) {
    std::vector<bool> seen(size_t(2 * kRowMultiple) * width);
    for (int row = 0; row < 2 * kRowMultiple; ++row)
      for (int f = 0; f < width; ++f) {
        const int64_t at = row_at(true, row, 2 * width) + 2 * feature_at(true, row, f);
        const int64_t tile = int64_t(row / kRowMultiple) * kRowMultiple * 2 * width;
        const int64_t plain = tile + int64_t(f / 64) * kRowMultiple * 128 + row % kRowMultiple * 128 + f % 64 * 2;
        good = good && at == (plain ^ (plain / 128 % 8) << 4) && !seen[size_t(at / 2)];
        seen[size_t(at / 2)] = true;
      }
  }
  for (int rows : {1, 256, 1000, 65536, 1 << 20})
    for (int cols : {1, 31, 4097, 65536}) {
      const Plan p = plan_sweep(rows, cols, 128, 128, 32, 264, 528);
      const int tiles = ceil_div(cols, 32);
      good = good && p.row_blocks * 128 >= rows && (p.splits - 1) * p.tiles_per_split < tiles &&
             p.splits * p.tiles_per_split >= tiles && (p.splits == 1 || int64_t(p.splits) * rows * 512 <= kSplitBytes);
    }
  if (!good) std::printf("FAILED maps\n");
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !std::strcmp(argv[1], "--quick");
  const Case cases[] = {
      // m, k (0: y = x), d, shift, offset, exclude_self, normalize, ids
      {4, 0, 3, 2, 0, true, true, false},        {1, 1, 1, 0, 0, false, false, false},
      {3, 7, 5, 0, 2, false, false, false},      {130, 0, 64, 65, 0, true, true, false},
      {256, 0, 128, 128, 0, true, true, false},  {65, 31, 33, 1, 0, true, true, false},
      {90, 140, 100, 5, 3, true, true, false},   {150, 70, 128, 0, 0, false, false, false},
      {70, 90, 200, 0, 1, true, true, true},     {300, 0, 20, 150, 0, true, true, false},
      {140, 0, 256, 70, 0, true, true, false},   {80, 150, 256, 0, 200, false, true, false},
      {66, 0, 40, 0, 0, true, true, true},       {50, 0, 1, 25, 0, true, true, false},
      {100, 150, 70, 20, 9, true, false, false}, {150, 100, 128, 0, 0, false, false, true},
      {20, 1100, 64, 3, 500, true, true, false}, {10, 600, 130, 0, 30, false, true, false},  // more tiles than stages
  };
  int failures = !check_maps(), count = 0;
  for (const Type& type : kTypes)
    for (const Case& c : cases)
      for (int multiprocessors : {1, 6}) {  // one column range, and several
        if (quick && c.d > 64) continue;
        failures += !check(type, c, multiprocessors, false), ++count;
        if (type.bytes == 2 && has_hopper()) failures += !check(type, c, multiprocessors, true), ++count;
      }
  for (const Type& type : kTypes)
    for (bool hopper : {false, true})
      for (float value : {std::nanf(""), INFINITY})
        if (!hopper || (type.bytes == 2 && has_hopper())) failures += !check_not_finite(type, hopper, value), ++count;
  std::printf("%d failures in %d cases and the index maps\n", failures, count);
  return failures != 0;
}
