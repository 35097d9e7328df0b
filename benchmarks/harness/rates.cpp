// SPDX-License-Identifier: Apache-2.0
// What the processor's vector units can do, for the floor: multiply-adds and exponentials on registers, nothing
// loaded, nothing stored. Compiled for this very machine by floor.py.
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// Independent chains hide the latency; with their constants they fit 16 registers.
constexpr int kMultiplyAddChains = 12, kExponentialChains = 4;

// 2^-v to about 1e-7: the integer part into the exponent's bits, the rest by a polynomial. Adding and subtracting
// 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
inline Floats exp2_of_minus(Floats v) {
  constexpr float kRound = 12582912.0f;
  const Floats shifted = kRound - v, t = -v - (shifted - kRound);
  Floats p = t * 1.3333558e-3f + 9.6181291e-3f;
  p = p * t + 5.5504109e-2f;
  p = p * t + 2.4022651e-1f;
  p = p * t + 6.9314718e-1f;
  p = p * t + 1.0f;
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// Applies f again and again to every chain. Constant indices keep the chains in registers, different starts keep
// the compiler from seeing that one would do.
template <std::size_t... chain, class F>
float iterate(int64_t rounds, std::index_sequence<chain...>, F f) {
  Floats v[sizeof...(chain)] = {(Floats{} + float(chain))...};
  for (int64_t i = 0; i < rounds; ++i) ((v[chain] = f(v[chain])), ...);
  return (v[chain][0] + ...);
}

float multiply_adds(int64_t rounds) {
  return iterate(rounds, std::make_index_sequence<kMultiplyAddChains>(), [](Floats v) { return v * 0.999f + 1e-3f; });
}

float exponentials(int64_t rounds) {
  return iterate(rounds, std::make_index_sequence<kExponentialChains>(), exp2_of_minus);
}

template <class Body>
double seconds(int threads, Body body) {
  std::vector<float> keep(threads);
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) pool.emplace_back([&, i] { keep[i] = body(); });
  for (auto& t : pool) t.join();
  const double time = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  volatile float sink = 0;
  for (float v : keep) sink = sink + v;
  return time;
}

}  // namespace

// Operations a second of bfloat16 pairs multiplied into float32 sums; 0 where there is no such instruction.
extern "C" double bfloat16_rate(int threads, int64_t rounds) {
#if defined(__AVX512BF16__)
  const double time = seconds(threads, [=] {
    return iterate(rounds, std::make_index_sequence<kMultiplyAddChains>(), [](Floats v) {
      const auto ones = (__m512bh)(Ints{} + 0x3f803f80);
      return (Floats)_mm512_dpbf16_ps((__m512)v, ones, ones);
    });
  });
  return 4.0 * kLanes * kMultiplyAddChains * double(rounds) * threads / time;
#else
  return 0.0 * double(threads) * double(rounds);
#endif
}

// Float32 operations a second of all threads; a multiply-add is two.
extern "C" double multiply_add_rate(int threads, int64_t rounds) {
  return 2.0 * kLanes * kMultiplyAddChains * double(rounds) * threads /
         seconds(threads, [=] { return multiply_adds(rounds); });
}

// Exponentials a second of all threads.
extern "C" double exponential_rate(int threads, int64_t rounds) {
  return 1.0 * kLanes * kExponentialChains * double(rounds) * threads /
         seconds(threads, [=] { return exponentials(rounds); });
}
