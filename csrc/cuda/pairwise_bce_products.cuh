// SPDX-License-Identifier: Apache-2.0
// The two matrix products of a tile, fragment by fragment: logits from rows and columns in shared memory, and the
// rows' gradient from the coefficients that the logits have become.
#pragma once

#include "pairwise_bce_tile.h"

namespace mio_ext {

// Splits float32 into TF32 numbers, the larger first.
MIO_DEVICE void split(uint32_t v, uint32_t& high, uint32_t& low) {
  high = bits_of(round_to_tf32(float_of(v)));
  low = bits_of(float_of(v) - float_of(high));
}

template <class A>
MIO_DEVICE void multiply(A, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(typename A::Element{}, c, a, b0, b1);
}
// The tensor cores cut sums off instead of rounding them: a sum over thousands of columns would drift. So a step's
// three products, the small ones first, are added outside.
MIO_DEVICE void multiply(Tf32x3, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t high[4], low[4], b_high[2], b_low[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) split(a[i], high[i], low[i]);
  split(b0, b_high[0], b_low[0]);
  split(b1, b_high[1], b_low[1]);
  float sum[4] = {};
  mma(float{}, sum, low, b_high[0], b_high[1]);
  mma(float{}, sum, high, b_low[0], b_low[1]);
  mma(float{}, sum, high, b_high[0], b_high[1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += sum[i];
}

// s = x y^T (2), but for the norms: this warp's rows, from shared memory at `rows`, and a tile of columns.
template <class A, class T, int F, int N>
MIO_DEVICE void logits(float (&s)[F][N][4], uint32_t rows, uint32_t columns) {
  const int lane = threadIdx.x % 32;
  const uint32_t a_at = rows + swizzled(lane % 16, lane / 16, T::kRowBytes);
  const uint32_t b_at = columns + swizzled(lane % 8 + lane / 16 * 8, lane / 8 % 2, T::kRowBytes);
#pragma unroll
  for (int f = 0; f < F; ++f)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[f][n][i] = 0;
#pragma unroll
  for (int step = 0; step < T::kSteps; ++step) {
    uint32_t a[F][4];
#pragma unroll
    for (int f = 0; f < F; ++f) ldmatrix(a[f], along(a_at, 2 * step) + f * 16 * T::kRowBytes);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      ldmatrix(b, along(b_at, 2 * step) + n * 8 * T::kRowBytes);
#pragma unroll
      for (int f = 0; f < F; ++f) {
        multiply(A{}, s[f][n], a[f], b[0], b[1]);
        multiply(A{}, s[f][n + 1], a[f], b[2], b[3]);
      }
    }
  }
}

// The accumulator's layout of coefficients is the left operand's: two 16-bit columns side by side are a pair.
template <class A, int F, int N>
MIO_DEVICE void left_operand(uint32_t (&a)[4], const float (&g)[N][4], int step) {
  if constexpr (sizeof(typename A::Element) == 2) {
    const typename A::Element type{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&from)[4] = g[2 * step + i / 2];
      a[i] = i % 2 ? pack(type, from[2], from[3]) : pack(type, from[0], from[1]);
    }
  } else {
    // Column 2q of the tile takes the place of q, and 2q + 1 that of q + 4: the sum does not mind the order.
    constexpr int kFrom[4] = {0, 2, 1, 3};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float v = g[step][kFrom[i]];
      a[i] = bits_of(A::kRound ? round_to_tf32(v) : v);
    }
  }
}

// Columns as the right operand: features 16 pair to 16 pair + 15 of the columns of `step`.
template <class A, class T>
MIO_DEVICE void right_operand(uint32_t (&b)[4], uint32_t columns, int step, int pair) {
  const int lane = threadIdx.x % 32;
  if constexpr (T::kBytes == 2) {
    const uint32_t at = columns + swizzled(lane % 16, lane / 16, T::kRowBytes);
    ldmatrix_trans(b, along(at, 2 * pair) + step * 16 * T::kRowBytes);
  } else {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = columns + swizzled(2 * q + i % 2, g / 4, T::kRowBytes) + g % 4 * 4;
      b[i] = load_shared(along(at, 4 * pair + i / 2 * 2) + step * 8 * T::kRowBytes);
    }
  }
}

// acc += g y (9)
template <class A, class T, int F, int N>
MIO_DEVICE void gradient(float (&acc)[F][T::kWidth / 8][4], const float (&g)[F][N][4], uint32_t columns) {
  constexpr int kColumns = 32 / T::kBytes;  // of a step
#pragma unroll
  for (int step = 0; step < 8 * N / kColumns; ++step) {
    uint32_t a[F][4];
#pragma unroll
    for (int f = 0; f < F; ++f) left_operand<A, F, N>(a[f], g[f], step);
#pragma unroll
    for (int pair = 0; pair < T::kWidth / 16; ++pair) {
      uint32_t b[4];
      right_operand<A, T>(b, columns, step, pair);
#pragma unroll
      for (int f = 0; f < F; ++f) {
        multiply(A{}, acc[f][2 * pair], a[f], b[0], b[1]);
        multiply(A{}, acc[f][2 * pair + 1], a[f], b[2], b[3]);
      }
    }
  }
}

}  // namespace mio_ext
