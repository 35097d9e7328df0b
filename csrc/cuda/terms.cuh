// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a tile of logits in registers, eq. (7)-(8) and (11)-(12): it becomes loss, statistics and G,
// d loss / d (x.y), from one exponential and one reciprocal each.
//
// A thread holds of a tile the rows and columns that `Order` says (tile.h).
#pragma once

#include "prepare.cuh"
#include "sums.cuh"

namespace mio_ext {

constexpr float kLn2 = 0.693147180559945f;
constexpr float kLog2e = 1.442695040888963f;

// e = 2^-|t| of a base-2 logit t gives max(t, 0), and with one reciprocal sigma(t). NaN stays NaN.
struct Term {
  float e, relu, sigmoid;
  MIO_DEVICE explicit Term(float t) {
    const bool below = t < 0;
    e = exp2_approx(-fabsf(t));
    relu = below ? 0 : t;
    const float r = reciprocal(1 + e);
    sigmoid = below ? e * r : r;
  }
};

// log2(1 + v) for v >= 0, to the last bits where v is tiny: the rounding of 1 + v cancels.
MIO_DEVICE float log2_1p(float v) {
  const float w = 1 + v;
  return w == 1 ? v * kLog2e : log2f(w) * (v / (w - 1));
}

struct Coefficients {
  float p, n, bias;                    // of the logits, base 2
  float weight_p, weight_n, weight_l;  // d loss / d (x.y) is weight_n sigma, or -weight_p sigma - weight_l

  MIO_DEVICE explicit Coefficients(const LossParams& v)
      : p(float(v.scale_p) * kLog2e),
        n(float(v.scale_n) * kLog2e),
        bias(float(v.bias) * kLog2e),
        weight_p(float(v.weight_p * v.scale_p)),
        weight_n(float(v.weight_n * v.scale_n)),
        weight_l(float(v.weight_l)) {}
};

// Sum of softplus(t) / ln 2 without a logarithm: max(t, 0) adds up, and of the factors 1 + e of the rest
// the product less 1 is kept, exact for tiny e; whole powers of two move to the sum before it overflows.
//     log2((1 + a)(1 + b)) = log2(1 + p),  p = a + b + a b:
// with a = b = 2^-30 the product itself would be 1 in float32, and p is 2^-29; with a = b = 1 it is 4, of which 2 goes
// to the sum and p = 0 stays.
struct SoftplusSum {
  float sum = 0, p = 0;

  // Of up to 64 terms, given as the sum of their max(t, 0) and the product of their 1 + e, less 1.
  MIO_DEVICE void add(float relu, float e) {
    const float q = p * e + (p + e);
    const uint32_t bits = bits_of(1 + q);
    const int exponent = int(bits >> 23) - 127;
    sum += relu + float(exponent);
    p = exponent > 0 ? float_of((bits & 0x007fffffu) | 0x3f800000u) - 1 : q;
  }
  MIO_DEVICE double total() const { return double(kLn2) * (double(sum) + double(log2_1p(p))); }
};

// (1 + a)(1 + b) - 1
MIO_DEVICE float times_1p(float a, float b) { return a * b + (a + b); }

// Four terms of a row, side by side, of which two share a reciprocal, and the Sum of up to kMost of them on its way
// into a SoftplusSum and a sum of sigmoids. times(j, c) is sigma c.
struct AnyTerms {
  float sigmoid[4];
  float relu, e;  // of all: the sum of max(t, 0), and the product of 1 + e, less 1

  MIO_DEVICE explicit AnyTerms(const float (&t)[4]) {
    float e1[4], relu1[4];
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      e1[j] = exp2_approx(-fabsf(t[j])), e1[j + 1] = exp2_approx(-fabsf(t[j + 1]));
      const float f[2] = {1 + e1[j], 1 + e1[j + 1]}, r = reciprocal(f[0] * f[1]);
#pragma unroll
      for (int i = j; i < j + 2; ++i) {
        const bool below = t[i] < 0;
        relu1[i] = below ? 0 : t[i];
        const float above = r * f[j + 1 - i];
        sigmoid[i] = below ? e1[i] * above : above;
      }
    }
    relu = (relu1[0] + relu1[1]) + (relu1[2] + relu1[3]);
    e = times_1p(times_1p(e1[0], e1[1]), times_1p(e1[2], e1[3]));
  }
  MIO_DEVICE float times(int j, float c) const { return sigmoid[j] * c; }

  struct Sum {
    static constexpr int kMost = 64;
    float relu = 0, p = 0, sigmoid = 0;
    MIO_DEVICE void add(const AnyTerms& terms) {
      relu += terms.relu, p = times_1p(p, terms.e);
      sigmoid += (terms.sigmoid[0] + terms.sigmoid[1]) + (terms.sigmoid[2] + terms.sigmoid[3]);
    }
    MIO_DEVICE void to(SoftplusSum& softplus, float& sigmoids, int) const {
      softplus.add(relu, p);
      sigmoids += sigmoid;
    }
  };
};

// The same of logits up to kBound in magnitude: without cases, for nothing is tiny beside 1, and with one reciprocal.
// 1 - sigma is at most 8/9, so sigma loses three bits to it; a product and a sum are saved.
struct BoundedTerms {
  static constexpr float kBound = 3;  // 32 of 1 + 2^3 are 2^101
  float rest[4];                      // 1 - sigma
  float factor;                       // of all 1 + e

  MIO_DEVICE explicit BoundedTerms(const float (&t)[4]) {
    float f[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) f[j] = 1 + exp2_approx(t[j]);
    const float two[2] = {f[0] * f[1], f[2] * f[3]};
    factor = two[0] * two[1];
    const float r = reciprocal(factor);
#pragma unroll
    for (int j = 0; j < 4; ++j) rest[j] = r * two[1 - j / 2] * f[j ^ 1];
  }
  MIO_DEVICE float times(int j, float c) const { return c - rest[j] * c; }

  struct Sum {
    static constexpr int kMost = 32;
    float p = 1, rest = 0;
    MIO_DEVICE void add(const BoundedTerms& terms) {
      p *= terms.factor;
      rest += (terms.rest[0] + terms.rest[1]) + (terms.rest[2] + terms.rest[3]);
    }
    MIO_DEVICE void to(SoftplusSum& softplus, float& sigmoids, int count) const {
      softplus.add(p - p, p - 1);  // NaN by the first: the second may lose it
      sigmoids += float(count) - rest;
    }
  };
};

// What a thread's F x 2 rows need of a sweep without ids, and its sums over negative pairs. G is sigma
// alone; weight_n comes in at the end. kProducts: the sums of products too, which project.cuh else has for less.
template <class A, int F, class Order, bool kProducts>
struct NegativeTerms {
  float scale[F][2];  // logit = (product without the row's norm) scale + bias; -inf for rows that do not exist
  float bias[F][2];
  SoftplusSum softplus;
  float product[F][2] = {}, sigmoid_product[F][2] = {}, sigmoid = 0;
  const Prepared& rows;
  int row0, n_cols;
  bool bounded;  // BoundedTerms will do

  MIO_DEVICE NegativeTerms(const Prepared& rows, const Prepared& cols, int row0, const Coefficients& coefficients,
                           bool normalize)
      : rows(rows),
        row0(row0),
        n_cols(cols.n),
        bounded(normalize && fabsf(coefficients.n) + fabsf(coefficients.bias) < BoundedTerms::kBound) {
#pragma unroll
    for (int f = 0; f < F; ++f)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + 16 * f + Order::kNextRow * h;
        scale[f][h] = rows.inverse[row] * coefficients.n / A::kLift;
        bias[f][h] = row < rows.n ? coefficients.bias : -float_of(0x7f800000u);
      }
  }

  MIO_DEVICE static float acc_weight(const Coefficients& coefficients) { return coefficients.weight_n / A::kLift; }

  // s [F, 8 N columns], x.y but for the norms, becomes sigma times the column's norm. factors: the columns'
  // inverse norms, in shared memory. crossed: some pairs are no negative ones.
  template <int N>
  MIO_DEVICE void tile(float (&s)[F][N][4], uint32_t factors, uint32_t, const Pairs& pairs, int row0, int col0,
                       bool crossed, bool loss) {
    if (crossed)
      tile_of<AnyTerms, true, true>(s, factors, pairs, row0, col0);
    else if (!loss)
      tile_of<AnyTerms, false, false>(s, factors, pairs, row0, col0);
    else if (bounded)
      tile_of<BoundedTerms, false, true>(s, factors, pairs, row0, col0);
    else
      tile_of<AnyTerms, false, true>(s, factors, pairs, row0, col0);
  }

  // kCrossed: pairs that are no negative ones take no part, and G is 0 there.
  template <class Terms, bool kCrossed, bool kLoss, int N>
  MIO_DEVICE void tile_of(float (&s)[F][N][4], uint32_t factors, const Pairs& pairs, int row0, int col0) {
    static_assert(N % 2 == 0);
    const int column = threadIdx.x % 4 * Order::kLaneColumns;
#pragma unroll
    for (int f = 0; f < F; ++f) {
      typename Terms::Sum sum;
      int positive[2], own[2], end = 0;  // columns from this thread's first on
      if constexpr (kCrossed) {          // braces: without them nvcc 13.0 leaves out the loop that follows
        for (int h = 0; h < 2; ++h) {
          positive[h] = pairs.positive(row0 + 16 * f + Order::kNextRow * h) - col0 - column;
          own[h] = pairs.own(row0 + 16 * f + Order::kNextRow * h) - col0 - column;
        }
        end = n_cols - col0 - column;
      }
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        float c[4];
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const float2 factor = load_shared_pair(factors + (Order::column(n + j / 2) + column) * 4);
          c[j] = factor.x * A::kLift, c[j + 1] = factor.y * A::kLift;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float v[4], t[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int col = Order::column(n + j / 2) + j % 2;
            v[j] = s[f][n + j / 2][2 * h + j % 2] * c[j];
            t[j] = v[j] * scale[f][h] + bias[f][h];
            if (kCrossed && (col == positive[h] || col == own[h] || col >= end))
              v[j] = 0, t[j] = -float_of(0x7f800000u);
          }
          const Terms terms(t);
          if constexpr (kLoss) {
            sum.add(terms);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float& to = s[f][n + j / 2][2 * h + j % 2];
            to = terms.times(j, c[j]);
            if constexpr (kLoss && kProducts) {
              product[f][h] += v[j];
              sigmoid_product[f][h] += terms.times(j, v[j]);
            }
          }
        }
        if constexpr (kLoss) {
          constexpr int kMost = Terms::Sum::kMost;
          if ((4 * n + 8) % kMost == 0 || n + 2 == N) {
            sum.to(softplus, sigmoid, (4 * n + 8) % kMost == 0 ? kMost : 4 * N % kMost);
            sum = typename Terms::Sum();
          }
        }
      }
    }
  }

  MIO_DEVICE void total(double (&sums)[kSums]) const {
    PairSums out;
    out.negative.softplus = softplus.total();
    out.negative.sigmoid = sigmoid;
#pragma unroll
    for (int f = 0; f < F; ++f)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const double inverse = double(rows.inverse[row0 + 16 * f + Order::kNextRow * h]) / A::kLift;
        out.negative.product += product[f][h] * inverse;
        out.negative.sigmoid_prod += sigmoid_product[f][h] * inverse;
      }
    to_array(out, sums);
  }
};

}  // namespace mio_ext
