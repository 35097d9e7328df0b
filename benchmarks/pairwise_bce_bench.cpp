// SPDX-License-Identifier: Apache-2.0
// Microbenchmark of the CPU kernel: the MIO step at one size, its rate, and the share of the float32
// multiply-add rate measured in the same process.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/openmp_threads.h"

namespace {

double seconds(const std::function<void()>& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// The floor: independent multiply-adds on registers, with the widest vectors the machine has.
#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2,fma", "default")))
#endif
float multiply_adds(int64_t rounds) {
  constexpr int kLanes = 16, kChains = 16;
  float acc[kChains][kLanes] = {};
  for (int64_t i = 0; i < rounds; ++i)
    for (auto& chain : acc)
      for (float& v : chain) v = v * 0.999f + 1e-3f;
  float sum = 0;
  for (const auto& chain : acc)
    for (float v : chain) sum += v;
  return sum;
}

double multiply_add_rate(int threads) {
  constexpr int64_t kRounds = 4'000'000;
  std::vector<float> keep(threads);
  const double t =
      seconds([&] { mio_ext::parallel_on_openmp(threads, [&](int i) { keep[i] = multiply_adds(kRounds); }); });
  return keep[0] == 0 ? 0 : 2.0 * 256 * kRounds * threads / t;
}

}  // namespace

int main(int argc, char** argv) {
  int64_t n = 8192, d = 128, repeat = 10, threads = 0;
  bool bf16 = false, known = true;
  for (int i = 1; i + 1 < argc; i += 2) {
    const int64_t value = std::atoll(argv[i + 1]);
    if (!std::strcmp(argv[i], "--n")) n = value;
    if (!std::strcmp(argv[i], "--d")) d = value;
    if (!std::strcmp(argv[i], "--repeat")) repeat = value;
    if (!std::strcmp(argv[i], "--threads")) threads = value;
    if (!std::strcmp(argv[i], "--dtype")) {
      bf16 = !std::strcmp(argv[i + 1], "bf16");
      known = bf16 || !std::strcmp(argv[i + 1], "fp32");
    }
  }
  if (!known || n < 4 || n % 2 || d < 1 || repeat < 1 || threads < 0) {
    std::fprintf(stderr,
                 "usage: pairwise_bce_bench [--n even] [--d features] [--dtype fp32|bf16] [--repeat times] "
                 "[--threads count]\n");
    return 2;
  }
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());

  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<float> x(n * d), dx(n * d);
  for (float& v : x) {
    v = normal(generator);
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    if (bf16) bits &= 0xffff0000u;
    std::memcpy(&v, &bits, sizeof bits);
  }
  mio_ext::PairwiseBCE<float> p{};
  p.x = x.data();
  p.m = p.k = n, p.d = d;
  p.bfloat16 = bf16;
  p.shift = n / 2;
  p.exclude_self = p.normalize = true;
  p.params = {2, 2, 0, 1.0 / double(n), 1.0 / (double(n) * double(n - 2)), 2.0 / (double(n) * double(d))};

  std::printf("%s, %ld threads, N = %ld, D = %ld, %s\n", mio_ext::cpu_instruction_set().c_str(), long(threads), long(n),
              long(d), bf16 ? "bfloat16" : "float32");
  double peak = 0;
  for (const bool grad : {true, false}) {
    p.dx = grad ? dx.data() : nullptr;
    std::vector<double> times;
    for (int64_t i = 0; i <= repeat; ++i) {
      peak = std::max(peak, multiply_add_rate(int(threads)));
      const double t = seconds([&] { mio_ext::pairwise_bce_on_threads(p, int(threads), mio_ext::parallel_on_openmp); });
      if (i) times.push_back(t);  // the first is warm-up
    }
    const double flops = (grad ? 1.5 : 0.5) * 2 * double(n) * double(n) * double(d), t = median(times);
    std::printf("%-18s %9.3f ms  %7.1f GFLOP/s of %.1f, %.0f %% of the float32 floor\n",
                grad ? "loss and gradient" : "loss only", t * 1e3, flops / t * 1e-9, peak * 1e-9,
                100 * flops / t / peak);
  }
}
