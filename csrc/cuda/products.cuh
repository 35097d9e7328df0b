// SPDX-License-Identifier: Apache-2.0
// The two matrix products of a tile, fragment by fragment: logits from rows and columns in shared memory, and the
// rows' gradient from G, which the logits have become.
//
// float32 in halves: (high + low)(high + low) but for low low, which is 2^-22 of it. The tensor cores cut sums off
// instead of rounding them, and a sum over thousands of columns would drift, so these sums are taken outside.
#pragma once

#include "tile.h"

namespace mio_ext {

// c += a b, with numbers j and j + 1 of b.
template <class A>
MIO_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[A::kParts][4], const uint32_t (&b)[A::kParts][4], int j) {
  const typename A::Element type{};
  if constexpr (A::kParts == 2) {
    mma(type, c, a[1], b[0][j], b[0][j + 1]);  // the small ones first
    mma(type, c, a[0], b[1][j], b[1][j + 1]);
  }
  mma(type, c, a[0], b[0][j], b[0][j + 1]);
}

// s = x y^T (2), but for the norms: this warp's rows, from shared memory at `rows`, and a tile of columns.
template <class A, class T, int F, int N>
MIO_DEVICE void logits(float (&s)[F][N][4], uint32_t rows, uint32_t columns) {
  constexpr int P = A::kParts;
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
    uint32_t a[F][P][4];
#pragma unroll
    for (int f = 0; f < F; ++f)
#pragma unroll
      for (int p = 0; p < P; ++p) ldmatrix(a[f][p], along(a_at, 2 * step) + p * T::kPartBytes + f * 16 * T::kRowBytes);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[P][4];
#pragma unroll
      for (int p = 0; p < P; ++p) ldmatrix(b[p], along(b_at, 2 * step) + p * T::kPartBytes + n * 8 * T::kRowBytes);
#pragma unroll
      for (int f = 0; f < F; ++f)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if constexpr (P == 1) {
            multiply<A>(s[f][n + j], a[f], b, 2 * j);
          } else {
            float sum[4] = {};
            multiply<A>(sum, a[f], b, 2 * j);
#pragma unroll
            for (int i = 0; i < 4; ++i) s[f][n + j][i] += sum[i];
          }
        }
    }
  }
}

// The accumulator's layout of G is the left operand's: two 16-bit columns side by side are a pair.
template <class A, int N>
MIO_DEVICE void left_operand(uint32_t (&a)[1][4], const float (&g)[N][4], int step) {
  if constexpr (sizeof(typename A::Element) == 2) {
    const typename A::Element type{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&from)[4] = g[2 * step + i / 2];
      a[0][i] = i % 2 ? pack(type, from[2], from[3]) : pack(type, from[0], from[1]);
    }
  } else {
    // Column 2q of the tile takes the place of q, and 2q + 1 that of q + 4: the sum does not mind the order.
    constexpr int kFrom[4] = {0, 2, 1, 3};
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][i] = bits_of(round_to_tf32(g[step][kFrom[i]]));
  }
}

// Halves of G, for which row h of the two is multiplied by power[h].
template <int N>
MIO_DEVICE void left_operand(uint32_t (&a)[2][4], const float (&g)[N][4], int step, const float (&power)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int h = i % 2;
    const float (&from)[4] = g[2 * step + i / 2];
    const float v0 = from[2 * h] * power[h], v1 = from[2 * h + 1] * power[h];
    a[0][i] = pack(Float16{}, v0, v1);
    const float high0 = to_float(Float16{uint16_t(a[0][i])}), high1 = to_float(Float16{uint16_t(a[0][i] >> 16)});
    a[1][i] = pack(Float16{}, v0 - high0, v1 - high1);
  }
}

// Columns as the right operand: features 16 pair to 16 pair + 15 of the columns of `step`.
template <class A, class T>
MIO_DEVICE void right_operand(uint32_t (&b)[A::kParts][4], uint32_t columns, int step, int pair) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(typename A::Element) == 2) {
    const uint32_t at = columns + swizzled(lane % 16, lane / 16, T::kRowBytes);
#pragma unroll
    for (int p = 0; p < A::kParts; ++p)
      ldmatrix_trans(b[p], along(at, 2 * pair) + p * T::kPartBytes + step * 16 * T::kRowBytes);
  } else {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = columns + swizzled(2 * q + i % 2, g / 4, T::kRowBytes) + g % 4 * 4;
      b[0][i] = load_shared(along(at, 4 * pair + i / 2 * 2) + step * 8 * T::kRowBytes);
    }
  }
}

// A power of two that brings a row's largest number of G in this tile to [2^14, 2^15), and its inverse. Four lanes
// have the row's columns.
struct RowPower {
  float power, inverse;
  template <int N>
  MIO_DEVICE RowPower(const float (&g)[N][4], int h) {
    uint32_t largest = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t magnitude = bits_of(g[n][2 * h + j]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      const uint32_t other = shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    int exponent = 127 + 14 + 127 - int(largest >> 23);
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    power = float_of(uint32_t(exponent) << 23);
    inverse = float_of(uint32_t(254 - exponent) << 23);
  }
};

// acc += g y (9); `columns` begin at the slice's first feature.
template <class A, class T, int F, int N>
MIO_DEVICE void gradient(float (&acc)[F][T::kSlice / 8][4], const float (&g)[F][N][4], uint32_t columns) {
  constexpr int kSteps = 8 * N / (32 / int(sizeof(typename A::Element))), kPairs = T::kSlice / 16;
  if constexpr (A::kParts == 1) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[F][1][4];
#pragma unroll
      for (int f = 0; f < F; ++f) left_operand<A, N>(a[f], g[f], step);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        uint32_t b[1][4];
        right_operand<A, T>(b, columns, step, pair);
#pragma unroll
        for (int f = 0; f < F; ++f)
#pragma unroll
          for (int j = 0; j < 2; ++j) multiply<A>(acc[f][2 * pair + j], a[f], b, 2 * j);
      }
    }
  } else {
    static_assert(F == 1);
    const RowPower rows[2] = {{g[0], 0}, {g[0], 1}};
    const float power[2] = {rows[0].power, rows[1].power};
    uint32_t a[kSteps][2][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) left_operand<N>(a[step], g[0], step, power);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      float sum[2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[2][4];
        right_operand<A, T>(b, columns, step, pair);
#pragma unroll
        for (int j = 0; j < 2; ++j) multiply<A>(sum[j], a[step], b, 2 * j);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[0][2 * pair + j][i] += sum[j][i] * rows[i / 2].inverse;
    }
  }
}

}  // namespace mio_ext
