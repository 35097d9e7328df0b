// SPDX-License-Identifier: Apache-2.0
// Vectors, the register-blocked matrix product and the exponential, for one instruction set.
//
// This file and those that build on it (terms.h, prepare*.h, linear.h, sweep.h) are compiled once per instruction set:
// instruction_sets.cpp sets the target and defines MIO_ISA (a namespace), MIO_VECTOR_BYTES and the register block
// MIO_MR rows x MIO_NV vectors. All arithmetic is in GCC vector extensions, so the same text serves AVX-512, AVX2, NEON
// and plain SSE2. None of them may include a standard header: an inline function instantiated here
// would carry this target's instructions into every other translation unit.

namespace mio_ext {
namespace MIO_ISA {

constexpr double kLn2 = 0.693147180559945309417232121458;

template <typename T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(MIO_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(MIO_VECTOR_BYTES)));
  using Lane = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kExponentBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kMinExponent = -69.0f;
  static constexpr int kExpTerms = 7;  // of the Taylor series on [-ln(2)/2, ln(2)/2]: relative error 5e-9
  // ln(2) in two parts; the first has so few bits that its product with the exponent is exact.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440054690583e-4f;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(MIO_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(MIO_VECTOR_BYTES)));
  using Lane = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kExponentBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMinExponent = -690.0;
  static constexpr int kExpTerms = 13;
  static constexpr double kLn2High = 0.69314718036912381649, kLn2Low = 1.9082149292705877000e-10;
};

template <typename T>
constexpr int kWidth = MIO_VECTOR_BYTES / sizeof(T);

// Two bfloat16 values, the first in the low half: one operand of a dot-product instruction.
using Pair = uint32_t;
template <>
struct Simd<Pair> {
  typedef Pair Vec __attribute__((vector_size(MIO_VECTOR_BYTES)));
  using Int = Vec;
};

// Columns of one register block; panels have this width.
template <typename T>
constexpr int kPanel = kWidth<T> * MIO_NV;

template <typename T>
inline typename Simd<T>::Vec load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Vec*>(p);
}
template <typename T>
inline typename Simd<T>::Int load_ids(const typename Simd<T>::Lane* p) {
  return *reinterpret_cast<const typename Simd<T>::Int*>(p);
}
template <typename T>
inline void store(T* p, typename Simd<T>::Vec v) {
  *reinterpret_cast<typename Simd<T>::Vec*>(p) = v;
}

// out [columns, W] = the transpose of in [W, columns], for at most W columns; in is readable up to a whole vector.
// Every round interleaves the first half of the vectors with the second.
template <typename T>
inline void transpose(const T* in, int64_t in_ld, int64_t columns, T* out, int64_t out_ld) {
  using Vec = typename Simd<T>::Vec;
  constexpr int W = kWidth<T>;
#if defined(__clang__)  // has no shuffle by a vector
  for (int i = 0; i < W && i < columns; ++i)
    for (int lane = 0; lane < W; ++lane) out[i * out_ld + lane] = in[lane * in_ld + i];
#else
  typename Simd<T>::Int low{}, high{};
  for (int lane = 0; lane < W; ++lane) low[lane] = lane / 2 + lane % 2 * W, high[lane] = low[lane] + W / 2;
  Vec v[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) v[i] = load(in + i * in_ld);
#pragma GCC unroll 4
  for (int rows = 1; rows < W; rows *= 2) {
    Vec next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
  for (int i = 0; i < W && i < columns; ++i) store(out + i * out_ld, v[i]);
#endif
}

// ---------------------------------------------------------------- matrix products

template <typename T>
inline typename Simd<T>::Vec multiply_add(T a, typename Simd<T>::Vec b, typename Simd<T>::Vec sum) {
  return sum + a * b;
}
#if defined(MIO_BFLOAT16)
inline Simd<float>::Vec multiply_add(Pair a, Simd<Pair>::Vec b, Simd<float>::Vec sum) {
  return Simd<float>::Vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(Simd<Pair>::Vec{} + a), __m512bh(b)));
}
#endif

// c [MIO_MR, NV vectors] (+)= a b over k, all accumulators in registers. They start at zero and meet c
// at the end: a sum of sums over tiles, which rounds less than one long sum.
// a(m, k) = a[m * lda + k], or a[k * lda + m] where kTransA. E: T, or Pair where T is float.
template <typename T, typename E, int NV, bool kTransA, bool kAccumulate>
inline void register_block(int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb, T* c, int64_t ldc) {
  using Vec = typename Simd<T>::Vec;
  constexpr int W = kWidth<T>;
  Vec acc[MIO_MR][NV];
#pragma GCC unroll 32
  for (int m = 0; m < MIO_MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[m][v] = Vec{};
  for (int64_t i = 0; i < k; ++i) {
    typename Simd<E>::Vec bv[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) bv[v] = load(b + i * ldb + v * W);
#pragma GCC unroll 32
    for (int m = 0; m < MIO_MR; ++m) {
      const E av = kTransA ? a[i * lda + m] : a[m * lda + i];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] = multiply_add(av, bv[v], acc[m][v]);
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < MIO_MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      T* at = c + m * ldc + v * W;
      store(at, kAccumulate ? load(at) + acc[m][v] : acc[m][v]);
    }
}

// A gradient larger than this, and the rows beside it, come from the last cache at every tile.
constexpr int64_t kNearBytes = 128 << 10;

// c [m, n] (+)= a b. m is rounded up to MIO_MR (the buffers have room), n is a multiple of the vector
// width. Panel p of b, kPanel columns wide, starts at b + p * b_panel and has rows of ldb elements.
template <typename T, typename E, bool kTransA, bool kAccumulate>
void gemm(int64_t m, int64_t n, int64_t k, const E* a, int64_t lda, const E* b, int64_t b_panel, int64_t ldb, T* c,
          int64_t ldc) {
  const int64_t a_step = kTransA ? 1 : lda;
  const bool far = kAccumulate && m * ldc * int64_t(sizeof(T)) > kNearBytes;
  int64_t n0 = 0;
  for (; n0 + kPanel<T> <= n; n0 += kPanel<T>, b += b_panel)
    for (int64_t m0 = 0; m0 < m; m0 += MIO_MR) {
      if (far)  // short pieces of distant rows, which no hardware foresees: of c for this block, of b for the next
                // panel
        for (int64_t i = m0; i < m0 + MIO_MR; ++i)
#pragma GCC unroll 8
          for (int v = 0; v < MIO_NV; ++v) {
            __builtin_prefetch(c + i * ldc + n0 + v * kWidth<T>, 1);
            if (i < k) __builtin_prefetch(b + b_panel + i * ldb + v * kWidth<T>, 0, 2);
          }
      register_block<T, E, MIO_NV, kTransA, kAccumulate>(k, a + m0 * a_step, lda, b, ldb, c + m0 * ldc + n0, ldc);
    }
  for (; n0 < n; n0 += kWidth<T>, b += kWidth<T>)
    for (int64_t m0 = 0; m0 < m; m0 += MIO_MR)
      register_block<T, E, 1, kTransA, kAccumulate>(k, a + m0 * a_step, lda, b, ldb, c + m0 * ldc + n0, ldc);
}

// ---------------------------------------------------------------- the exponential

// 1 / i!
template <int N>
struct ExpSeries {
  double c[N + 1];
  constexpr ExpSeries() : c{1} {
    for (int i = 1; i <= N; ++i) c[i] = c[i - 1] / i;
  }
};

// exp(u) for u <= 0. NaN stays NaN. The clamp keeps every later product clear of denormals.
template <typename T>
inline typename Simd<T>::Vec exp_nonpositive(typename Simd<T>::Vec u) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  u = u < S::kMinExponent ? Vec{} + S::kMinExponent : u;
  const Vec rounded = u * T(1 / kLn2) + S::kRound;
  const Vec n = rounded - S::kRound;
  const Vec f = (u - n * S::kLn2High) - n * S::kLn2Low;
  constexpr ExpSeries<S::kExpTerms> series;
  Vec poly = Vec{} + T(series.c[S::kExpTerms]);
#pragma GCC unroll 16
  for (int i = S::kExpTerms - 1; i >= 0; --i) poly = poly * f + T(series.c[i]);
  // The low bits of `rounded` are n; as an exponent field they make 2^n.
  const Int power = (reinterpret_cast<Int>(rounded) + S::kExponentBias) << S::kMantissaBits;
  return poly * reinterpret_cast<Vec>(power);
}

}  // namespace MIO_ISA
}  // namespace mio_ext
