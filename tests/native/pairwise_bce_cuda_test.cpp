// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels against a plain double loop over pairs, in cuda_emulator.h; compiled by nvcc, on the GPU.
//
//   pairwise_bce_cuda_test [--kind bf16|fp16|tf32|fp16x3] [--hopper 0|1] [--d features]
//
// runs the cases that all of these allow. Every case is named before it runs, so that of one which hangs there is a
// trace; an error of CUDA's fails its case, and ends the program if the device is lost to it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda_ids_test.h"
#include "cuda_test_problem.h"

namespace {

using namespace mio_ext;

// Of the terms, by what is known of unit vectors' logits: csrc/cuda/terms.cuh.
enum class Form { kBounded, kCapped, kAny };
constexpr Form kForms[] = {Form::kBounded, Form::kCapped, Form::kAny};
constexpr const char* kFormNames[] = {"bounded", "capped", "any"};

// Exact in float32.
LossParams params_of(Form form, bool normalize) {
  const double scale = form == Form::kBounded ? 1.5 : form == Form::kCapped ? 9 : 12;
  return {4, scale, form == Form::kBounded ? -0.5 : -9, 0.5, 1.0 / 64, normalize ? 0.25 : 0};
}

bool check(const Type& type, const Case& c, const Options& options, Form form) {
  const int64_t k = c.k ? c.k : c.m;
  const int stride = c.d % 2 ? 2 : 1;
  const Input x(type, c.m, c.d, stride, 1), y(type, k, c.d, stride, 2);
  std::vector<int64_t> x_ids(c.m), y_ids(k);
  for (int64_t i = 0; i < c.m; ++i) x_ids[i] = (i * 7 % 5) << 40;
  for (int64_t j = 0; j < k; ++j) y_ids[j] = (j * 3 % 5) << 40;
  const LossParams params = params_of(form, c.normalize);
  const Result expected = by_double_loop(c, x.values, y.values, x_ids, y_ids, params);
  Options variant = options, alone = options;
  variant.variant = true, alone.want_dx = false;
  const Outputs out = run(type, c, params, x, y, x_ids, y_ids, options);
  const Outputs again = run(type, c, params, x, y, x_ids, y_ids, variant);

  const double loss_error = std::abs(out.loss / expected.loss - 1);
  auto mean_error = [](double mean, double expected) {  // of negative pairs, if there are any
    return expected == expected ? std::abs(mean / expected - 1) : 0;
  };
  const double negatives_error =
      std::max(mean_error(out.stats[3], expected.mean_loss), mean_error(out.stats[7], expected.mean_sigmoid));
  // The error of a product, times the scale, is one of a logit and, where sigma is small, a relative one of its loss.
  const double negatives_limit =
      type.arithmetic == Arithmetic::kTf32 ? type.gradient_limit : type.loss_limit * params.scale_n;
  // Beside a product's own size, 1 / sqrt(D), for they cancel. The Hopper kernel takes the other from its gradient, of
  // sigmas rounded to 16 bits.
  const double product_error = expected.mean_product == expected.mean_product
                                   ? std::abs(out.stats[5] - expected.mean_product) * std::sqrt(double(c.d))
                                   : 0;
  const double scale_error =
      std::abs(out.dparams[1] - expected.scale_gradient) / (std::abs(expected.scale_gradient) + 1e-2 * expected.loss);
  // At D = 1 eq. (10) leaves no gradient.
  const bool none = c.d == 1 && c.normalize;
  const double dx_error = none ? 0 : relative_distance(out.dx, expected.dx);
  const double dy_error = c.k && !none ? relative_distance(out.dy, expected.dy) : 0;
  const bool same = again == out;  // other blocks came first
  bool alone_good = true;          // dy alone, whose sweep makes the loss; or nothing but the loss
  if (c.k || c.d > kMaxFusedFeatures) {
    const Outputs dy = run(type, c, params, x, y, x_ids, y_ids, alone);
    alone_good = std::abs(dy.loss / expected.loss - 1) < type.loss_limit &&
                 (none || !c.k || relative_distance(dy.dy, expected.dy) < type.gradient_limit);
  }
  std::printf("loss %.1e dx %.1e dy %.1e negatives %.1e product %.1e scale %.1e%s%s", loss_error, dx_error, dy_error,
              negatives_error, product_error, scale_error, same ? "" : ", other bits in another order",
              alone_good ? "" : ", dy alone is wrong");
  // Written so that NaN fails.
  return loss_error < type.loss_limit && negatives_error < negatives_limit && alone_good &&
         dx_error < type.gradient_limit && dy_error < type.gradient_limit &&
         product_error < (type.bytes == 2 ? 1e-6 : type.gradient_limit) && scale_error < type.gradient_limit && same;
}

struct Pattern {
  const char* name;
  uint32_t float32, bfloat16, float16;
  bool nan;
  uint32_t bits(const Type& type) const {
    return type.bytes == 4 ? float32 : type.arithmetic == Arithmetic::kBf16 ? bfloat16 : float16;
  }
};
// NaN of several kinds: what a GPU's arithmetic makes, a CPU's, with a sign, signalling with its last bit alone.
constexpr Pattern kPatterns[] = {{"NaN of a GPU", 0x7fffffff, 0x7fff, 0x7fff, true},
                                 {"NaN of a CPU", 0x7fc00000, 0x7fc0, 0x7e00, true},
                                 {"negative NaN", 0xffffffff, 0xffff, 0xffff, true},
                                 {"signalling NaN", 0x7f800001, 0x7f81, 0x7c01, true},
                                 {"negative signalling NaN", 0xff800001, 0xff81, 0xfc01, true},
                                 {"Inf", 0x7f800000, 0x7f80, 0x7c00, false},
                                 {"-Inf", 0xff800000, 0xff80, 0xfc00, false}};

// One feature that is not finite: in x, in its second part, or in y, of a column that is nobody's positive and crossed
// by no diagonal. Without normalize Inf is a number like others, and may meet a logit whose loss is 0.
bool check_not_finite(const Type& type, const Options& options, bool ids, bool normalize) {
  bool good = true;
  std::vector<int64_t> x_ids(64), y_ids(400);
  for (int64_t i = 0; i < 64; ++i) x_ids[i] = i;
  for (int64_t j = 0; j < 400; ++j) y_ids[j] = j;
  for (const Pattern& pattern : kPatterns)
    for (const char* where : {"x", "x2", "y"}) {
      if (!pattern.nan && !normalize) continue;
      // Of 64 rows all warps are whole, and only the first tiles of columns are crossed; of 40 some warps are not, and
      // take all tiles for crossed.
      const Case c{&pattern == kPatterns ? 40 : 64, 400, 64, 0, 0, false, normalize, ids};
      Input x(type, c.m, c.d, 1, 1), y(type, c.k, c.d, 1, 2);
      const bool in_y = !std::strcmp(where, "y");
      (in_y ? y : x).put(in_y ? 300 * c.d + 5 : where[1] ? 35 * c.d + 5 : 3 * c.d + 5, pattern.bits(type));
      for (const Form form : kForms) {
        if (form != Form::kAny && !in_y) continue;  // x has a positive pair, which is of no form
        const LossParams params = params_of(form, false);
        Options variant = options;
        variant.variant = where[1];
        const Outputs out = run(type, c, params, x, y, x_ids, y_ids, variant);
        const float gradient = in_y ? out.dx[0] : out.dy[0];
        if (std::isnan(out.loss) && std::isnan(out.stats[3]) && std::isnan(gradient)) continue;
        std::printf("\n  a %s in %s is lost, %s: loss %f, mean loss of negatives %f, gradient %f\n", pattern.name,
                    where, kFormNames[int(form)], double(out.loss), out.stats[3], double(gradient));
        good = false;
      }
    }
  return good;
}

// A temperature, scale or bias that is not finite, read on the device. A bias of Inf is one: the loss is Inf.
bool check_numbers_not_finite(const Type& type, const Options& options, bool ids) {
  const Case c{40, 0, 64, 20, 0, true, true, ids};
  const Input x(type, c.m, c.d, 1, 1);
  const std::vector<int64_t> zeros(c.m, 0);
  bool good = true;
  for (const double value : {double(NAN), double(INFINITY), -double(INFINITY)})
    for (int which = 0; which < 3; ++which) {
      LossParams params{2, 2, 0, 0.5, 1.0 / 64, 0.25};
      double& number = which == 0 ? params.scale_p : which == 1 ? params.scale_n : params.bias;
      if (ids && which != 0) continue;  // there are positives only
      number = value;
      Options variant = options;
      variant.variant = true;
      const float loss = run(type, c, params, x, x, zeros, zeros, variant).loss;
      if (which == 2 && !std::isnan(value) ? std::isinf(loss) : std::isnan(loss)) continue;
      std::printf("\n  number %d as %f is lost: loss %f\n", which, value, double(loss));
      good = false;
    }
  return good;
}

// Why the kernel for compute capability 9.0 cannot run here; empty: it can.
std::string without_hopper() {
#if defined(__CUDACC__)
  int device = 0, major = 0, minor = 0;
  check_device(cudaGetDevice(&device));
  check_device(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_device(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return "this GPU has " + std::to_string(major) + "." + std::to_string(minor);
  if (!hopper_is_built()) return "the build is not for 9.0a";
#endif
  return "";
}

// Special columns against the definition, for every row; crossings may only err on the safe side, and not by more than
// the block and the tile are high and wide.
bool check_pairs(const Pairs& p) {
  bool good = true;
  const int rows = p.transposed ? p.k : p.m, cols = p.transposed ? p.m : p.k;
  for (int r = 0; r < rows; ++r)
    for (int col = 0; col < cols; ++col) {
      const int i = p.transposed ? col : r, j = p.transposed ? r : col;
      const bool own = p.exclude_self && j == p.offset + i;
      const bool positive = !own && j == p.offset + (i + p.shift) % p.m;
      good = good && (p.own(r) == col) == own && (p.positive(r) == col) == positive;
      if (own || positive) good = good && p.crossings(r / 16 * 16, 16, 8).at(col / 8 * 8);
    }
  const int sign = p.transposed ? -1 : 1;
  for (int row0 = 0; row0 < rows; row0 += 16)
    for (int col0 = 0; col0 < cols; col0 += 8) {
      bool crossed = false;
      for (int r = row0; r < row0 + 16; ++r)
        for (int col = col0; col < col0 + 8; ++col) {
          const int diagonal = sign * (col - r);
          crossed = crossed || (p.exclude_self && diagonal == p.offset) || diagonal == p.offset + p.shift ||
                    diagonal == p.offset + p.shift - p.m;
        }
      good = good && p.crossings(row0, 16, 8).at(col0) == crossed;
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
        const int64_t at = row_at(Layout::kTiled, row, 2 * width) + 2 * feature_at(Layout::kTiled, row, f);
        const int64_t tile = int64_t(row / kRowMultiple) * kRowMultiple * 2 * width;
        const int64_t plain = tile + int64_t(f / 64) * kRowMultiple * 128 + row % kRowMultiple * 128 + f % 64 * 2;
        good = good && at == (plain ^ (plain / 128 % 8) << 4) && !seen[size_t(at / 2)];
        seen[size_t(at / 2)] = true;
      }
  }
  // Gathered: the other order of tiled rows, and what a thread then finds in its accumulators' places.
  for (int row = 0; row < 2 * kRowMultiple; ++row)
    for (int f : {0, 9, 70, 319})
      good = good && gathered(gathered(row)) == row &&
             row_at(Layout::kGathered, row, 640) == row_at(Layout::kTiled, gathered(row), 640) &&
             feature_at(Layout::kGathered, row, f) == feature_at(Layout::kTiled, gathered(row), f);
  for (int lane = 0; lane < 32; ++lane)
    for (int warp = 0; warp < 8; ++warp)
      for (int h = 0; h < 2; ++h)
        good =
            good && gathered(16 * warp + lane / 4 + 8 * h) == gathered(16 * warp + lane / 4) + h * Gathered::kNextRow;
  for (int q = 0; q < 4; ++q)
    for (int n = 0; n < WideTile::kBlockN / 8; ++n)
      for (int j = 0; j < 2; ++j)
        good = good && gathered(8 * n + 2 * q + j) == Gathered::column(n) + q * Gathered::kLaneColumns + j;
  std::vector<bool> taken(1024);
  for (uint32_t row = 0; row < 128; ++row)
    for (uint32_t chunk = 0; chunk < 4; ++chunk) {
      const uint32_t at = PortableWideTile::place(row, chunk);
      good = good && at % 16 == 0 && at < 128 * PortableWideTile::kRowBytes && !taken[at / 16] &&
             at == (PortableWideTile::place(row, chunk & 1) ^ (chunk & 2) << 4) &&
             PortableWideTile::place((row + 16) % 128, chunk) == (at + 1024) % 8192;
      taken[at / 16] = true;
    }
  for (int rows : {1, 256, 1000, 65536, 1 << 20})
    for (int cols : {1, 31, 4097, 65536}) {
      const Plan p = plan_sweep(rows, cols, 128, 128, 32, 264, 528, false);
      const int tiles = ceil_div(cols, 32);
      good = good && p.row_blocks * 128 >= rows && (p.splits - 1) * p.tiles_per_split < tiles &&
             p.splits * p.tiles_per_split >= tiles && (p.splits == 1 || int64_t(p.splits) * rows * 512 <= kSplitBytes);
    }
  const Plan small = plan_sweep(256, 256, 128, 128, 32, 132, 132, true);  // 16 blocks
  good = good && small.row_blocks == 2 && small.splits == 8 && small.tiles_per_split == 1;
  if (!good) std::printf("FAILED maps\n");
  return good;
}

// The most that siglip-kernel 0.1.2 holds: two gradients of 16 bits, three sums a row, and logits of 16 bits of 4096
// rows and of those before them. Less than on an H100 at D = 768: 46,190,080, 318,964,736 and 1,275,855,872 bytes.
int64_t siglip_kernel_bytes(int64_t b, int64_t d) {
  const int64_t logits = (b < 8192 ? b : 8192) * b * 2;
  return logits + 4 * b * d + 12 * b;
}

// All that a call with two gradients asks for, of features that need no dense copy, where there is a chunk that small.
bool check_memory() {
  bool good = siglip_kernel_bytes(4096, 768) <= 46190080 && siglip_kernel_bytes(16384, 768) <= 318964736 &&
              siglip_kernel_bytes(65536, 768) <= 1275855872;
  float some = 0;
  for (int b : {1024, 2048, 3072, 3500, 4096, 5000, 6144, 8192, 10000, 16384, 32768, 65536, 131072})
    for (int d : {512, 768, 1152}) {
      PairwiseBCECuda p{};
      p.arithmetic = Arithmetic::kBf16;
      p.x.data = p.y.data = &some, p.dx = p.dy = &some;
      p.x_rows = p.m = p.k = b, p.d = d;
      p.most_chunk_rows = b, p.multiprocessors = 132, p.hopper = p.x_direct = p.y_direct = true;
      const int64_t bytes = 2 * int64_t(b) * d * 4 + int64_t(workspace_bytes(p)) + int64_t(chunk_rows(p)) * b * 2;
      const int64_t limit = siglip_kernel_bytes(b, d);
      if (bytes <= limit || b < 4 * d + 384) continue;
      std::printf("FAILED memory B=%d D=%d: %lld bytes, at most %lld\n", b, d, (long long)bytes, (long long)limit);
      good = false;
    }
  return good;
}

constexpr Case kCases[] = {
    // m, k (0: y = x), d, shift, offset, exclude_self, normalize, ids
    {4, 0, 3, 2, 0, true, true, false},         {1, 1, 1, 0, 0, false, false, false},
    {3, 7, 5, 0, 2, false, false, false},       {130, 0, 64, 65, 0, true, true, false},
    {256, 0, 128, 128, 0, true, true, false},   {65, 31, 33, 1, 0, true, true, false},
    {90, 140, 100, 5, 3, true, true, false},    {150, 70, 128, 0, 0, false, false, false},
    {70, 90, 200, 0, 1, true, true, true},      {300, 0, 20, 150, 0, true, true, false},
    {140, 0, 256, 70, 0, true, true, false},    {80, 150, 256, 0, 200, false, true, false},
    {66, 0, 40, 0, 0, true, true, true},        {50, 0, 1, 25, 0, true, true, false},
    {100, 150, 70, 20, 9, true, false, false},  {150, 100, 128, 0, 0, false, false, true},
    {20, 1100, 64, 3, 500, true, true, false},  {10, 600, 130, 0, 30, false, true, false},  // more tiles than stages
    {20, 1800, 128, 3, 500, true, true, false},
};
// Most tiles whole and crossed by no diagonal, for each form of the terms.
constexpr Case kWholeCases[] = {
    {64, 500, 64, 0, 0, false, true, false},
    {64, 500, 128, 0, 3, true, true, false},
    {64, 300, 256, 0, 0, false, true, false},
    {128, 600, 264, 0, 0, false, true, false},
};
// Chunked, with one kernel for logits and G.
constexpr Case kWideCases[] = {
    {130, 0, 300, 65, 0, true, true, false},    {300, 0, 257, 150, 0, true, true, false},
    {140, 290, 270, 5, 3, true, true, false},   {290, 140, 333, 0, 0, false, true, false},
    {260, 520, 320, 0, 0, false, false, false}, {100, 600, 512, 3, 500, true, false, false},
    {270, 100, 264, 0, 0, false, false, true},  {259, 0, 384, 0, 0, true, true, true},
    {1, 1, 1152, 0, 0, false, false, false},    {257, 257, 768, 0, 0, false, false, false},
};

struct Filter {
  const char* kind = nullptr;
  int hopper = -1, d = -1;  // -1: all

  bool parse(int argc, char** argv) {
    for (int i = 1; i + 1 < argc; i += 2) {
      if (!std::strcmp(argv[i], "--kind"))
        kind = argv[i + 1];
      else if (!std::strcmp(argv[i], "--hopper"))
        hopper = std::atoi(argv[i + 1]);
      else if (!std::strcmp(argv[i], "--d"))
        d = std::atoi(argv[i + 1]);
      else
        return false;
    }
    return argc % 2 == 1;
  }
  bool takes(const Type& type, bool with_hopper, int64_t features) const {
    return (!kind || !std::strcmp(kind, type.name)) && (hopper < 0 || hopper == with_hopper) &&
           (d < 0 || d == features);
  }
};

struct Tally {
  int cases = 0, hopper = 0, failures = 0;

  void run(const Type& type, bool with_hopper, const std::string& name, const std::function<bool()>& body) {
    std::printf("%s%s %s: ", type.name, with_hopper ? " hopper" : "", name.c_str());
    std::fflush(stdout);
    ++cases, hopper += with_hopper;
    bool good = false;
    try {
      good = body();
    } catch (const std::exception& error) {
      std::printf("%s", error.what());
      if (device_is_lost()) {
        std::printf("\nFAILED; the device is lost to this process, and the cases that follow with it\n");
        std::exit(3);
      }
    }
    failures += !good;
    std::printf(" %s\n", good ? "ok" : "FAILED");
  }
};

std::string name_of(const Case& c, int multiprocessors) {
  char text[128];
  std::snprintf(text, sizeof text, "m=%ld k=%ld d=%ld ids=%d, %d multiprocessors", long(c.m), long(c.k), long(c.d),
                c.ids, multiprocessors);
  return text;
}

void run_all(const Type& type, bool hopper, const Filter& filter, Tally& tally) {
  Options options;
  options.hopper = hopper;
  auto run_case = [&](const Case& c, Form form) {
    const std::string name = name_of(c, options.multiprocessors) + ", " + kFormNames[int(form)];
    tally.run(type, hopper, name, [&] { return check(type, c, options, form); });
  };
  for (const Case& c : kCases)
    for (int multiprocessors : {1, 6}) {  // one column range, and several
      if (!filter.takes(type, hopper, c.d)) continue;
      options.multiprocessors = multiprocessors;
      run_case(c, multiprocessors == 1 ? Form::kBounded : c.m / 10 % 2 == 1 ? Form::kCapped : Form::kAny);
    }
  options.multiprocessors = 1;
  for (const Case& c : kWholeCases)
    for (const Form form : kForms)
      if (filter.takes(type, hopper, c.d) && (type.bytes == 2 || c.d <= kMaxFusedFeatures)) run_case(c, form);
  for (const Case& c : kWideCases)
    for (int multiprocessors : {1, 5}) {  // one chunk, and the smallest chunks
      if (type.bytes == 4 || (!hopper && multiprocessors == 1) || !filter.takes(type, hopper, c.d)) continue;
      options.multiprocessors = multiprocessors;
      options.most_chunk_rows = multiprocessors == 1 ? 1 << 20 : kChunkMultiple;
      run_case(c, multiprocessors == 1 ? Form::kBounded : c.m / 10 % 2 == 1 ? Form::kCapped : Form::kAny);
    }
  options.multiprocessors = 1;
  if (!filter.takes(type, hopper, 64)) return;
  tally.run(type, hopper, "ids", [&] { return check_ids(type, options, {70, 300, 64, 3, 5, true, true, true}); });
  if (type.bytes == 2)
    tally.run(type, hopper, "ids, wide rows",
              [&] { return check_ids(type, options, {70, 600, 264, 3, 5, true, true, true}); });
  for (bool ids : {false, true}) {
    const std::string with = ids ? ", ids" : "";
    for (bool normalize : {true, false})
      tally.run(type, hopper, "features that are not finite" + with + (normalize ? ", normalize" : ""),
                [&] { return check_not_finite(type, options, ids, normalize); });
    tally.run(type, hopper, "numbers that are not finite" + with,
              [&] { return check_numbers_not_finite(type, options, ids); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 1 << 12);
  Filter filter;
  if (!filter.parse(argc, argv)) {
    std::fprintf(stderr,
                 "usage: pairwise_bce_cuda_test [--kind bf16|fp16|tf32|fp16x3] [--hopper 0|1] [--d features]\n");
    return 2;
  }
  const std::string lacking = without_hopper();
  Tally tally;
  const bool maps = check_maps() && check_memory();
  for (const bool hopper : {false, true})
    for (const Type& type : kTypes)
      if (!hopper || (type.bytes == 2 && lacking.empty())) run_all(type, hopper, filter, tally);
  if (lacking.empty())
    std::printf("the kernel for compute capability 9.0 ran in %d cases\n", tally.hopper);
  else
    std::printf("the kernel for compute capability 9.0 DID NOT RUN: %s\n", lacking.c_str());
  std::printf("%d failures in %d cases, index maps and memory %s\n", tally.failures, tally.cases,
              maps ? "ok" : "FAILED");
  return tally.failures != 0 || !maps || tally.cases == 0;
}
