// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a tile of logits in registers, eq. (7)-(8) and (11)-(12): it becomes loss, statistics and G,
// d loss / d (x.y), from one exponential each, and a reciprocal for two, four or eight.
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
  // The same without a max(t, 0), of factors of which none is tiny beside 1; their product began at kLowest.
  static constexpr float kLowest = 0x1p-100f;
  MIO_DEVICE void add_factors(float product) {
    const uint32_t bits = bits_of((1 + p) * product);
    sum += float(int(bits >> 23) - int(bits_of(kLowest) >> 23)) + (product - product);  // NaN, which bits lose
    p = float_of((bits & 0x007fffffu) | 0x3f800000u) - 1;
  }
  MIO_DEVICE double total() const { return double(kLn2) * (double(sum) + double(log2_1p(p))); }
};

// (1 + a)(1 + b) - 1
MIO_DEVICE float times_1p(float a, float b) { return a * b + (a + b); }

MIO_DEVICE float sum_eight(const float (&v)[8]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Sums over up to kMost logits t, base 2, on their way into a SoftplusSum and a sum of sigmas. Eight at a time are
// added, and become sigma(t) = weight - kShift. Some of them share a reciprocal: with f = 1 + e,
//     1 / f0 = f1 / (f0 f1).
// Three forms, for fewer instructions the more is known of t.

// Any t, by e = 2^-|t|.
struct AnyTerms {
  static constexpr int kMost = 64;
  static constexpr float kShift = 0;
  float relu = 0, p = 0, sigma = 0;  // of max(t, 0), of the product of 1 + e, less 1, and of sigma

  MIO_DEVICE void add(const float (&t)[8], float (&weight)[8]) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float e[2] = {exp2_approx(-fabsf(t[j])), exp2_approx(-fabsf(t[j + 1]))};
      const float f[2] = {1 + e[0], 1 + e[1]}, both = f[0] * f[1], r = reciprocal(both);
      weight[j] = r * f[1], weight[j + 1] = r * f[0];
#pragma unroll
      for (int i = 0; i < 2; ++i) times_or_add(t[j + i], weight[j + i], e[i], relu);
      p = p * both + (e[0] * f[1] + e[1]);
    }
    sigma += sum_eight(weight);
  }
  MIO_DEVICE void to(SoftplusSum& softplus, float& sigmas, int) const {
    softplus.add(relu, p);
    sigmas += sigma;
  }
};

// t up to kTop, however far below: e = 2^t itself, no case of a sign, and no max(t, 0).
struct CappedTerms {
  static constexpr float kTop = 0.9f, kMostScale = 4096;  // which leave rounding room: 64 of 1 + 2^1.5 are 2^125
  static constexpr int kMost = 64;
  static constexpr float kShift = 0;
  float p = 0, sigma = 0;

  // By |x^ . y^| <= 1, of unit vectors.
  MIO_DEVICE static bool will_do(const Coefficients& c) {
    return fabsf(c.n) < kMostScale && fabsf(c.n) + c.bias < kTop;
  }
  MIO_DEVICE void add(const float (&t)[8], float (&weight)[8]) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      float over[4], less_one[2], two[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float e[2] = {exp2_approx(t[j + 2 * i]), exp2_approx(t[j + 2 * i + 1])};
        over[2 * i] = e[0] * e[1] + e[0], over[2 * i + 1] = e[0] * e[1] + e[1];  // sigma f0 f1
        less_one[i] = over[2 * i] + e[1], two[i] = 1 + less_one[i];
      }
      const float four = two[0] * two[1], r = reciprocal(four);
#pragma unroll
      for (int i = 0; i < 4; ++i) weight[j + i] = over[i] * (r * two[1 - i / 2]);
      p = p * four + (less_one[0] * two[1] + less_one[1]);
    }
    sigma += sum_eight(weight);
  }
  MIO_DEVICE void to(SoftplusSum& softplus, float& sigmas, int) const {
    softplus.add(p - p, p);  // NaN by the first: the second may lose it
    sigmas += sigma;
  }
};

// |t| up to kTop: nothing is tiny beside 1, and sigma, 1/9 to 8/9, keeps its bits in 1 + sigma. These are numbers in
// [1, 2), so their sum is one of integers, two to an instruction.
struct BoundedTerms {
  static constexpr float kTop = 3;
  static constexpr int kMost = 64;  // of 1 + 2^3 are 2^203
  static constexpr float kShift = 1;
  float product = SoftplusSum::kLowest;  // of 1 + e
  uint32_t weights = 0;                  // their bits, added up

  MIO_DEVICE static bool will_do(const Coefficients& c) { return fabsf(c.n) + fabsf(c.bias) < kTop; }
  MIO_DEVICE void add(const float (&t)[8], float (&weight)[8]) {
    float f[8], two[4];
#pragma unroll
    for (int j = 0; j < 8; ++j) f[j] = 1 + exp2_approx(t[j]);
#pragma unroll
    for (int i = 0; i < 4; ++i) two[i] = f[2 * i] * f[2 * i + 1];
    const float four[2] = {two[0] * two[1], two[2] * two[3]}, all = four[0] * four[1], r = reciprocal(all);
#pragma unroll
    for (int j = 0; j < 8; ++j) weight[j] = 2 - r * four[1 - j / 4] * two[j / 2 ^ 1] * f[j ^ 1];
#pragma unroll
    for (int j = 0; j < 8; j += 2) weights += bits_of(weight[j]) + bits_of(weight[j + 1]);
    product *= all;
  }
  MIO_DEVICE void to(SoftplusSum& softplus, float& sigmas, int count) const {
    softplus.add_factors(product);
    sigmas += float(int(weights - count * bits_of(1.0f))) * (1.0f / (1 << 23)) + (product - product);
  }
};

// The norms' factors of a thread's columns of a tile, from shared memory, where they lie as Order::Factors says: the
// first 4 kAhead are read at once, the others when they are asked for.
template <class Order, int kAhead = 0>
struct ColumnFactors {
  using Factors = typename Order::Factors;
  uint32_t place;
  float4 ahead[kAhead + 1] = {};
  MIO_DEVICE explicit ColumnFactors(uint32_t factors) : place(factors + threadIdx.x % 4 * Factors::kLaneColumns * 4) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = read_four(2 * i);
  }
  MIO_DEVICE float2 pair(int n) const { return load_shared_pair(place + Factors::column(n) * 4); }
  MIO_DEVICE float4 four(int n) const { return n < 2 * kAhead ? ahead[n / 2] : read_four(n); }  // of n and n + 1

 private:
  MIO_DEVICE float4 read_four(int n) const {
    if constexpr (std::is_same_v<Factors, Gathered>) return load_shared_four(place + Factors::column(n) * 4);
    const float2 a = pair(n), b = pair(n + 1);
    return {a.x, a.y, b.x, b.y};
  }
};

enum class Form { kAny, kCapped, kBounded };

// What a thread's F x 2 rows need of a sweep without ids, and its sums over negative pairs. G is sigma
// alone; weight_n comes in at the end. kProducts: the sums of products too, which project.cuh else has for less.
template <class A, int F, class Order, bool kProducts>
struct NegativeTerms {
  float scale[F][2], bias;  // logit = (product without the row's norm) scale + bias
  SoftplusSum softplus;
  float product[F][2] = {}, weighted_product[F][2] = {}, sigmoid = 0;
  const Prepared &rows, &cols;
  const Pairs& pairs;
  int row0;
  Form form;
  bool loss;

  MIO_DEVICE NegativeTerms(const Prepared& rows, const Prepared& cols, const Pairs& pairs, int row0,
                           const Coefficients& coefficients, bool normalize, bool loss)
      : bias(coefficients.bias),
        rows(rows),
        cols(cols),
        pairs(pairs),
        row0(row0),
        form(form_of(coefficients, normalize)),
        loss(loss) {
#pragma unroll
    for (int f = 0; f < F; ++f)
#pragma unroll
      for (int h = 0; h < 2; ++h) scale[f][h] = rows.inverse[row_of(f, h)] * coefficients.n / A::kLift;
  }

  MIO_DEVICE static float acc_weight(const Coefficients& coefficients) { return coefficients.weight_n / A::kLift; }

  MIO_DEVICE static Form form_of(const Coefficients& coefficients, bool normalize) {
    if (!normalize) return Form::kAny;
    return BoundedTerms::will_do(coefficients)  ? Form::kBounded
           : CappedTerms::will_do(coefficients) ? Form::kCapped
                                                : Form::kAny;
  }
  MIO_DEVICE float shift() const { return form == Form::kBounded ? BoundedTerms::kShift : 0; }

  // s [F, 8 N columns], x.y but for the norms, becomes sigma times the column's norm. ready(): s is there; what does
  // not need it comes before. factors: the columns' inverse norms, in shared memory, of which 4 kAhead come before.
  // crossed: not all of these are negative pairs of rows and columns that exist. If none of a thread's rows exists,
  // they may count, for its sums do not.
  template <int kAhead, int N, class Ready>
  MIO_DEVICE void tile(float (&s)[F][N][4], Ready ready, uint32_t factors, uint32_t, int col0, bool crossed) {
    if (crossed)
      tile_of<AnyTerms, true, true, kAhead>(s, ready, factors, col0);
    else if (!loss)
      tile_of<AnyTerms, false, false, kAhead>(s, ready, factors, col0);
    else if (form == Form::kBounded)
      tile_of<BoundedTerms, false, true, kAhead>(s, ready, factors, col0);
    else if (form == Form::kCapped)
      tile_of<CappedTerms, false, true, kAhead>(s, ready, factors, col0);
    else
      tile_of<AnyTerms, false, true, kAhead>(s, ready, factors, col0);
  }

  MIO_DEVICE int row_of(int f, int h) const { return row0 + 16 * f + Order::kNextRow * h; }

  // kCrossed: pairs that are no negative ones take no part, and G is 0 there.
  template <class Terms, bool kCrossed, bool kLoss, int kAhead, int N, class Ready>
  MIO_DEVICE void tile_of(float (&s)[F][N][4], Ready ready, uint32_t factors_at, int col0) {
    static_assert(N % 2 == 0);
    const ColumnFactors<Order, kAhead> factors(factors_at);
    ready();
    const int column = threadIdx.x % 4 * Order::kLaneColumns;
#pragma unroll
    for (int f = 0; f < F; ++f) {
      Terms sums;
      int positive[2], own[2], end[2];  // columns from this thread's first on
      if constexpr (kCrossed) {         // braces: without them nvcc 13.0 leaves out the loop that follows
        for (int h = 0; h < 2; ++h) {
          positive[h] = pairs.positive(row_of(f, h)) - col0 - column;
          own[h] = pairs.own(row_of(f, h)) - col0 - column;
          end[h] = row_of(f, h) < rows.n ? cols.n - col0 - column : 0;
        }
      }
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        const float4 four = factors.four(n);
        const float c[4] = {four.x * A::kLift, four.y * A::kLift, four.z * A::kLift, four.w * A::kLift};
        float v[8], t[8], weight[8];  // of two rows
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int h = i / 4, j = i % 4, col = Order::column(n + j / 2) + j % 2;
          v[i] = s[f][n + j / 2][2 * h + j % 2] * c[j];
          t[i] = v[i] * scale[f][h] + bias;
          if (kCrossed && (col == positive[h] || col == own[h] || col >= end[h]))
            v[i] = 0, t[i] = -float_of(0x7f800000u);
        }
        sums.add(t, weight);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int h = i / 4, j = i % 4;
          s[f][n + j / 2][2 * h + j % 2] = weight[i] * c[j] - (Terms::kShift == 0 ? 0 : c[j]);
          if constexpr (kLoss && kProducts) {
            product[f][h] += v[i];
            weighted_product[f][h] += (weight[i] + (kCrossed ? shift() : 0)) * v[i];
          }
        }
        if constexpr (kLoss) {
          constexpr int kMost = Terms::kMost;
          if ((4 * n + 8) % kMost == 0 || n + 2 == N) {
            sums.to(softplus, sigmoid, (4 * n + 8) % kMost == 0 ? kMost : 4 * N % kMost);
            sums = Terms();
          }
        }
      }
    }
  }

  MIO_DEVICE void total(double (&sums)[kSums]) const {
    PairSums out;
    if (row0 >= rows.n) return to_array(out, sums);
    out.negative.softplus = softplus.total();
    out.negative.sigmoid = sigmoid;
#pragma unroll
    for (int f = 0; f < F; ++f)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const double inverse = double(rows.inverse[row_of(f, h)]) / A::kLift;
        out.negative.product += product[f][h] * inverse;
        out.negative.sigmoid_prod += (weighted_product[f][h] - shift() * product[f][h]) * inverse;
      }
    to_array(out, sums);
  }
};

}  // namespace mio_ext
