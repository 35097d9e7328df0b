// SPDX-License-Identifier: Apache-2.0
// Microbenchmark of the fused CUDA kernels, without torch: the MIO step at one size in every arithmetic and by every
// kernel, its rate, and its share of the floor (docs/cuda.md): matrix products, special functions and bytes, whichever
// takes longest.
//
//   pairwise_bce_cuda_bench [--n rows] [--d features] [--repeat times]
//
// Every launch takes the next of several copies of all memory, together larger than the cache, so that nothing is
// found there. CUDA events around each; median, 20 % and 80 %. The kernels for compute capability 9.0 come first, and
// are held to the portable one: |dx - its dx| / |its dx|, at this size. An error costs the kind that it comes up in;
// but where the device is lost to it, all that follow, which is said.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace {

using namespace mio_ext;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which) {
  int value = 0, device = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

struct Kind {
  Arithmetic arithmetic;
  const char* name;
  int bytes;
  double products;  // of 16-bit operands that one multiply-add costs
  bool hopper;
};
constexpr Kind kKinds[] = {
    {Arithmetic::kBf16, "bf16 hopper", 2, 1, true}, {Arithmetic::kFp16, "fp16 hopper", 2, 1, true},
    {Arithmetic::kBf16, "bf16", 2, 1, false},       {Arithmetic::kFp16, "fp16", 2, 1, false},
    {Arithmetic::kTf32, "tf32", 4, 2, false},       {Arithmetic::kFp16x3, "fp16x3", 4, 3, false}};
// Of Hopper's gradient against the portable one: logits that differ in their last bits, and so some coefficients in the
// last of theirs. A tile of columns left out would be some hundredths.
constexpr double kMostDifference = 1e-3;

// One copy of all the memory of a step.
struct Step {
  PairwiseBCECuda problem{};
  size_t bytes = 0;
  std::vector<void*> memory;

  Step(const Kind& kind, int n, int d, const std::vector<unsigned char>& features) {
    problem.arithmetic = kind.arithmetic;
    problem.m = problem.k = problem.x_rows = n;
    problem.d = d;
    problem.shift = n / 2;
    problem.exclude_self = problem.normalize = true;
    problem.constants = {2, 2, 0, 1.0 / n, 1.0 / (double(n) * (n - 2)), 2.0 / (double(n) * d)};
    problem.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    problem.hopper = kind.hopper;
    void* x = take(features.size());
    check(cudaMemcpy(x, features.data(), features.size(), cudaMemcpyHostToDevice));
    problem.x = {x, d, 1};
    problem.loss = static_cast<float*>(take(4));
    problem.stats = static_cast<double*>(take(64));
    problem.dx = static_cast<float*>(take(size_t(n) * d * 4));
    PairwiseBCECuda portable = problem;  // takes more or less
    portable.hopper = false;
    problem.workspace = take(std::max(workspace_bytes(problem), workspace_bytes(portable)));
  }
  Step(Step&& other) noexcept : problem(other.problem), bytes(other.bytes) { memory.swap(other.memory); }
  ~Step() {
    for (void* p : memory) cudaFree(p);
  }

 private:
  void* take(size_t size) {
    void* p = nullptr;
    check(cudaMalloc(&p, size));
    memory.push_back(p);
    bytes += size;
    return p;
  }
};

std::vector<unsigned char> random_features(const Kind& kind, int n, int d) {
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<unsigned char> raw(size_t(n) * d * kind.bytes);
  for (size_t i = 0; i < size_t(n) * d; ++i) {
    const float v = normal(generator);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    uint16_t half = uint16_t(bits >> 16);  // bfloat16, cut off
    if (kind.arithmetic == Arithmetic::kFp16) {
      const _Float16 h = _Float16(v);
      std::memcpy(&half, &h, 2);
    }
    std::memcpy(&raw[i * kind.bytes], kind.bytes == 4 ? static_cast<const void*>(&v) : &half, kind.bytes);
  }
  return raw;
}

// Seconds at best; 0 where the device's rates are not known.
double floor_of(const Kind& kind, double n, double d, bool grad) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor), minor = attribute(cudaDevAttrComputeCapabilityMinor);
  const double fma = major == 9 ? 2048 : major == 8 && minor == 0 ? 1024 : 0;  // 16-bit, a clock and multiprocessor
  if (fma == 0) return 0;
  const double clock = attribute(cudaDevAttrClockRate) * 1e3 * attribute(cudaDevAttrMultiProcessorCount);
  const double units = grad ? (kind.arithmetic == Arithmetic::kFp16x3 && d > 128 ? 3 : 2) : 1;
  const double matrix = units * n * n * d * kind.products / (fma * clock);
  const double special = 1.125 * n * n / (16 * clock);  // BoundedTerms
  return std::max(matrix, special);
}

// Loss and gradient of one launch.
std::vector<float> gradient(const PairwiseBCECuda& problem) {
  std::vector<float> dx(size_t(problem.m) * problem.d);
  float loss = 0;
  launch_pairwise_bce(problem, nullptr);
  check(cudaGetLastError());
  check(cudaMemcpy(&loss, problem.loss, 4, cudaMemcpyDeviceToHost));
  check(cudaMemcpy(dx.data(), problem.dx, dx.size() * 4, cudaMemcpyDeviceToHost));
  if (!std::isfinite(loss)) throw std::runtime_error("the loss is " + std::to_string(loss));
  return dx;
}

void compare_with_portable(PairwiseBCECuda problem) {
  const std::vector<float> dx = gradient(problem);
  problem.hopper = false;
  const std::vector<float> portable = gradient(problem);
  double difference = 0, size = 0;
  for (size_t i = 0; i < dx.size(); ++i) {
    difference += (double(dx[i]) - portable[i]) * (double(dx[i]) - portable[i]);
    size += double(portable[i]) * portable[i];
  }
  const double relative = std::sqrt(difference / size);
  std::printf("            dx differs from the portable kernel's by %.1e (relative L2)\n", relative);
  if (!(relative < kMostDifference)) throw std::runtime_error("that is more than rounding: the gradient is wrong");
}

// Milliseconds of each launch, sorted.
std::vector<float> times_of(const std::vector<Step>& steps, bool grad, int repeat) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start)), check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = -3; i < repeat; ++i) {
    PairwiseBCECuda problem = steps[size_t(i + 3) % steps.size()].problem;
    if (!grad) problem.dx = nullptr;
    check(cudaEventRecord(start));
    launch_pairwise_bce(problem, nullptr);
    check(cudaEventRecord(end));
    check(cudaGetLastError());
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, end));
    if (i >= 0) times.push_back(milliseconds);  // the first three are warm-up
  }
  check(cudaEventDestroy(start)), check(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times;
}

void measure(const Kind& kind, int n, int d, int repeat) {
  const std::vector<unsigned char> features = random_features(kind, n, d);
  const size_t cache = size_t(attribute(cudaDevAttrL2CacheSize));
  std::vector<Step> steps;
  do steps.emplace_back(kind, n, d, features);
  while (steps.size() < 2 || (steps.size() - 1) * (steps[0].bytes - (size_t(16) << 20)) < 2 * cache);
  for (const bool grad : {true, false}) {
    if (!grad && kind.hopper) continue;  // the portable kernel's
    const std::vector<float> times = times_of(steps, grad, repeat);
    const double t = times[times.size() / 2] * 1e-3, least = floor_of(kind, n, d, grad);
    std::printf("%-11s %-18s %9.4f ms (%.4f to %.4f)  %7.1f TFLOP/s", kind.name,
                grad ? "loss and gradient" : "loss only", t * 1e3, times[times.size() / 5], times[times.size() * 4 / 5],
                (grad ? 2 : 1) * 2.0 * n * n * d / t * 1e-12);
    if (least > 0) std::printf("  floor %.4f ms, %.0f %% of it", least * 1e3, 100 * least / t);
    std::printf("\n");
  }
  kind.hopper ? compare_with_portable(steps[0].problem) : void(gradient(steps[0].problem));
}

}  // namespace

int main(int argc, char** argv) {
  int n = 65536, d = 128, repeat = 20;
  bool good = argc % 2 == 1;
  for (int i = 1; i + 1 < argc; i += 2) {
    int* to = !std::strcmp(argv[i], "--n")        ? &n
              : !std::strcmp(argv[i], "--d")      ? &d
              : !std::strcmp(argv[i], "--repeat") ? &repeat
                                                  : nullptr;
    good = good && to;
    if (to) *to = std::atoi(argv[i + 1]);
  }
  if (!good || n < 4 || n % 2 || d < 1 || d > kMaxFusedFeatures || repeat < 1) {
    std::fprintf(stderr, "usage: pairwise_bce_cuda_bench [--n even] [--d up to %d] [--repeat times]\n",
                 kMaxFusedFeatures);
    return 2;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 1 << 12);
  cudaDeviceProp device{};
  if (const cudaError_t error = cudaGetDeviceProperties(&device, 0); error != cudaSuccess) {
    std::fprintf(stderr, "pairwise_bce_cuda_bench: %s\n", cudaGetErrorString(error));
    return 1;
  }
  std::printf("%s, N = %d, D = %d, MIO\n", device.name, n, d);
  const bool hopper = hopper_is_built() && device.major == 9 && device.minor == 0;
  if (!hopper) std::printf("the kernels for compute capability 9.0 do not run here\n");
  int failed = 0;
  for (const Kind& kind : kKinds) {
    if (kind.hopper && !hopper) continue;
    try {
      measure(kind, n, d, repeat);
    } catch (const std::exception& error) {
      std::printf("%-11s FAILED: %s\n", kind.name, error.what());
      ++failed;
      cudaGetLastError();
      if (cudaDeviceSynchronize() == cudaSuccess) continue;
      std::printf("the device is lost to this process, and the kinds that follow with it\n");
      return 1;
    }
  }
  return failed != 0;
}
