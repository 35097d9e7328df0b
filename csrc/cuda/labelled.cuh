// SPDX-License-Identifier: Apache-2.0
// The terms of sweeps with ids, where any pair may be positive.
//
// A thread takes a group of eight logits at a time, two rows and four columns. If a warp's vote finds no equal keys
// (key_of() in tile.h), its groups go the way of a sweep without ids. Else they go through code without branches, in
// which the sums of each class are a matter of predicates. What is rare, that a logit is of no pair or that equal keys
// are of different ids, is asked in another form of that code.
#pragma once

#include <type_traits>

#include "terms.cuh"

namespace mio_ext {

// Sums of one thread over pairs of one class.
struct ThreadSums {
  SoftplusSum softplus;
  float product = 0, sigmoid = 0, sigmoid_product = 0;
  int count = 0;

  // All but the softplus, which goes by groups.
  MIO_DEVICE void add(const Term& term, float of) {
    count += 1;
    product += of;
    sigmoid += term.sigmoid;
    sigmoid_product += term.sigmoid * of;
  }
  MIO_DEVICE void to(ClassSums& out) const {
    out.count = count;
    out.softplus = softplus.total();
    out.product = product;
    out.sigmoid = sigmoid;
    out.sigmoid_prod = sigmoid_product;
  }
};

// G with ids: d loss / d (x.y) over `unit`, the largest there is.
struct LabelledWeights {
  float unit, p, n, l;
  MIO_DEVICE explicit LabelledWeights(const Coefficients& s) : unit(unit_of(s)) {
    const float over = unit > 0 ? 1 / unit : unit == 0 ? 0 : unit;
    p = -s.weight_p * over, n = s.weight_n * over, l = -s.weight_l * over;
  }
  MIO_DEVICE static float unit_of(const Coefficients& s) {
    return fmaxf(fabsf(s.weight_p) + fabsf(s.weight_l), fabsf(s.weight_n));
  }
};

// Sums of one thread over a tile, of up to 64 pairs, that its groups with positive pairs have beside those that go
// through a whole sweep.
template <int F>
struct MixedSums {
  float relu_n = 0;                                     // of max(t, 0)
  float relu_p = 0, p = 0;                              // and of positive pairs the product of 1 + e, less 1,
  float count[F][2] = {}, product = 0, half_norms = 0;  // and, of the norms, the columns' at first
};

template <class A, int F, class Order>
struct LabelledTerms {
  float inverse[F][2];
  uint32_t key[F][2];
  ThreadSums positive, negative;
  float distance = 0;
  Coefficients coefficients;
  LabelledWeights weights;
  const Prepared &rows, &cols;
  const Pairs& pairs;
  int row0;
  // kAsked: keys of this warp's rows may be those of several ids, or some of its rows do not exist. kCapped:
  // CappedTerms will do.
  enum class Form { kAsked, kNoLoss, kCapped, kAny } form;

  MIO_DEVICE LabelledTerms(const Prepared& rows, const Prepared& cols, const Pairs& pairs, int row0,
                           const Coefficients& coefficients, bool normalize, bool loss)
      : coefficients(coefficients),
        weights(coefficients),
        rows(rows),
        cols(cols),
        pairs(pairs),
        row0(row0),
        form(!loss                                             ? Form::kNoLoss
             : normalize && CappedTerms::will_do(coefficients) ? Form::kCapped
                                                               : Form::kAny) {
    uint32_t all = 0;
#pragma unroll
    for (int f = 0; f < F; ++f)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + 16 * f + Order::kNextRow * h;
        inverse[f][h] = rows.inverse[row] / A::kLift;
        key[f][h] = rows.keys[row];
        all |= key[f][h];
      }
    if (any_of_warp(is_hashed(all) || last_row() >= rows.n)) form = Form::kAsked;
  }

  MIO_DEVICE static float acc_weight(const Coefficients& coefficients) {
    return LabelledWeights::unit_of(coefficients) / A::kLift;
  }

  // As in NegativeTerms, with positive pairs. keys: the columns', in shared memory.
  template <int, int N, class Ready>
  MIO_DEVICE void tile(float (&s)[F][N][4], Ready ready, uint32_t factors, uint32_t keys, int col0, bool crossed) {
    const ColumnFactors<Order> column_factors(factors);
    ready();
    if (crossed || form == Form::kAsked)
      tile_of<AnyTerms, true, true>(s, column_factors, keys, col0, crossed || last_row() >= rows.n);
    else if (form == Form::kNoLoss)
      tile_of<AnyTerms, false, false>(s, column_factors, keys, col0, false);
    else if (form == Form::kCapped)
      tile_of<CappedTerms, false, true>(s, column_factors, keys, col0, false);
    else
      tile_of<AnyTerms, false, true>(s, column_factors, keys, col0, false);
  }

  MIO_DEVICE void total(double (&sums)[kSums]) const {
    PairSums out;
    positive.to(out.positive);
    negative.to(out.negative);
    out.negative.count = -positive.count;  // of all pairs, which project.cuh counts
    out.distance = distance;
    to_array(out, sums);
  }

 private:
  MIO_DEVICE int last_row() const { return row0 + 16 * (F - 1) + Order::kNextRow; }

  // Four columns of a tile.
  struct Group {
    int row0, col0;  // this thread's first
    float c[4];
    uint32_t keys[4];
    MIO_DEVICE static int column(int j) { return Order::column(j / 2) + j % 2; }  // from the first on
  };

  // kAsks: equal keys may be of different ids, and if `crossed`, some logits are of no pair.
  template <class Terms, bool kAsks, bool kLoss, int N>
  MIO_DEVICE void tile_of(float (&s)[F][N][4], const ColumnFactors<Order>& factors, uint32_t keys, int col0,
                          bool crossed) {
    const int column = threadIdx.x % 4 * Order::kLaneColumns;
    bool mixed = false;
    MixedSums<F> sums;
#pragma unroll
    for (int f = 0; f < F; ++f) {
      Terms sum;
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        auto& four = reinterpret_cast<float (&)[2][4]>(s[f][n]);
        Group group;
        group.row0 = row0 + 16 * f, group.col0 = col0 + Order::column(n) + column;
        bool some = crossed;
        const float4 c = factors.four(n);
        group.c[0] = c.x * A::kLift, group.c[1] = c.y * A::kLift, group.c[2] = c.z * A::kLift,
        group.c[3] = c.w * A::kLift;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const uint2 two = load_shared_words(keys + (Order::column(n + j / 2) + column) * 4);
          group.keys[j] = two.x, group.keys[j + 1] = two.y;
#pragma unroll
          for (int h = 0; h < 2; ++h) some |= (two.x == key[f][h]) | (two.y == key[f][h]);
        }
        if (any_of_warp(some)) {
          mixed = true;
#pragma unroll
          for (int j = 0; j < 4; ++j) hold(group.keys[j]);  // or the vote's eight predicates would be kept
          both_classes<kAsks, kLoss>(four, group, f, kAsks ? Asked(rows, cols, group, pairs) : Asked(), sum.p, sums);
        } else {
          negatives<Terms, kLoss>(four, group, f, sum);
        }
        constexpr int kMost = Terms::kMost;
        if (kLoss && ((4 * n + 8) % kMost == 0 || n + 2 == N)) {
          sum.to(negative.softplus, negative.sigmoid, (4 * n + 8) % kMost == 0 ? kMost : 4 * N % kMost);
          sum = Terms();
        }
      }
    }
    if (kLoss && mixed) {
      negative.softplus.sum += sums.relu_n;
      positive.softplus.add(sums.relu_p, sums.p);
#pragma unroll
      for (int f = 0; f < F; ++f)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          positive.count += int(sums.count[f][h]);
          sums.half_norms += sums.count[f][h] * rows.half_norm[row0 + 16 * f + Order::kNextRow * h];
        }
      positive.product += sums.product;
      distance += sums.half_norms - sums.product;
    }
  }

  template <class Terms, bool kLoss>
  MIO_DEVICE void negatives(float (&s)[2][4], const Group& group, int f, Terms& sum) {
    float v[8], t[8], weight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int h = i / 4, j = i % 4;
      v[i] = s[j / 2][2 * h + j % 2] * group.c[j];
      t[i] = v[i] * (inverse[f][h] * coefficients.n) + coefficients.bias;
    }
    sum.add(t, weight);
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i % 4 / 2][i / 4 * 2 + i % 2] = weight[i] * (group.c[i % 4] * weights.n);
    if constexpr (kLoss) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sums[2] = {};
#pragma unroll
        for (int j = 4 * h; j < 4 * h + 4; j += 2)
          sums[0] += v[j] + v[j + 1], sums[1] += weight[j] * v[j] + weight[j + 1] * v[j + 1];
        negative.product += sums[0] * inverse[f][h];
        negative.sigmoid_product += sums[1] * inverse[f][h];
      }
    }
  }

  // Which of a group's logits are of no pair, and which of a positive one: bit 4 h + j.
  struct Asked {
    uint32_t none = 0, same = 0;

    MIO_DEVICE Asked() {}
    MIO_DEVICE Asked(const Prepared& rows, const Prepared& cols, const Group& group, const Pairs& pairs) {
#pragma unroll 1
      for (int h = 0; h < 2; ++h) {
        const int row = group.row0 + Order::kNextRow * h, own = pairs.own(row);
        const int64_t id = rows.ids[row < rows.n ? row : 0];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int col = group.col0 + group.column(j);
          const bool pair = row < rows.n && col < cols.n && col != own;
          const bool equal = cols.ids[col < cols.n ? col : 0] == id;
          none |= uint32_t(!pair) << (4 * h + j);
          same |= uint32_t(pair & equal) << (4 * h + j);
        }
      }
    }
  };

  // p: of negative pairs, the product of 1 + e, less 1.
  template <bool kAsks, bool kLoss>
  MIO_DEVICE void both_classes(float (&s)[2][4], const Group& group, int f, const Asked& asked, float& p,
                               MixedSums<F>& sums) {
    float half[4];
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const float2 two = *reinterpret_cast<const float2*>(cols.half_norm + group.col0 + group.column(j));
      half[j] = two.x, half[j + 1] = two.y;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float own_inverse = inverse[f][h];
      hold(own_inverse);  // or there would be a register more through the loop
      const float scale_n = inverse[f][h] * coefficients.n, scale_p = own_inverse * -coefficients.p;
      bool same[4];
      float v[4], t[4], e[4], sigmoid[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[j] = s[j / 2][2 * h + j % 2] * group.c[j];
        same[j] = group.keys[j] == key[f][h];
        t[j] = v[j] * scale_n + coefficients.bias;
        if constexpr (kAsks) {
          same[j] = asked.same >> (4 * h + j) & 1;
          if (asked.none >> (4 * h + j) & 1) v[j] = 0, t[j] = -float_of(0x7f800000u);
        }
        if (same[j]) t[j] = v[j] * scale_p - coefficients.bias;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) e[j] = exp2_approx(-fabsf(t[j]));
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const float r = reciprocal((1 + e[j]) * (1 + e[j + 1]));
        sigmoid[j] = r * (1 + e[j + 1]), sigmoid[j + 1] = r * (1 + e[j]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float relu = t[j] < 0 ? 0 : t[j], product = v[j] * inverse[f][h];
        if (t[j] < 0) sigmoid[j] *= e[j];
        float g = sigmoid[j] * weights.n;
        if (same[j]) g = sigmoid[j] * weights.p + weights.l;
        s[j / 2][2 * h + j % 2] = g * group.c[j];
        if constexpr (!kLoss) continue;
        if (same[j]) {
          sums.count[f][h] += 1;
          sums.half_norms += half[j];
          sums.product += product;
          sums.relu_p += relu;
          sums.p = sums.p * (1 + e[j]) + e[j];
          positive.sigmoid += sigmoid[j];
          positive.sigmoid_product += sigmoid[j] * product;
        } else {
          sums.relu_n += relu;
          p = p * (1 + e[j]) + e[j];
          negative.product += product;
          negative.sigmoid += sigmoid[j];
          negative.sigmoid_product += sigmoid[j] * product;
        }
      }
    }
  }
};

template <class A, int F, bool kIds, class Order = Straight, bool kProducts = true>
using TileTerms = std::conditional_t<kIds, LabelledTerms<A, F, Order>, NegativeTerms<A, F, Order, kProducts>>;

}  // namespace mio_ext
