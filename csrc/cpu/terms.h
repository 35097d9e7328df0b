// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one tile, eq. (7)-(8) and (11)-(12): logits become loss, statistics and gradient
// coefficients in place, from one exponential each.
#include "simd.h"

namespace mio_ext {
namespace MIO_ISA {

// softplus and sigmoid of t from one exponential: with e = exp(-|t|),
// softplus(t) = max(t, 0) + log1p(e), sigmoid(t) = 1/(1+e) or e/(1+e).
template <typename T>
struct Term {
  using Vec = typename Simd<T>::Vec;
  Vec e, relu, sigmoid;

  explicit Term(Vec t) {
    const Vec zero{};
    relu = t < zero ? zero : t;  // NaN stays NaN
    e = exp_nonpositive<T>(t < zero ? t : -t);
    const Vec r = T(1) / (T(1) + e);
    sigmoid = t < zero ? e * r : r;
  }
  // Zero outside the mask.
  Term(const Term& o, typename Simd<T>::Int mask) {
    const Vec zero{};
    e = mask ? o.e : zero;
    relu = mask ? o.relu : zero;
    sigmoid = mask ? o.sigmoid : zero;
  }
};

// Sums of terms. log1p is taken once per many of them: 1 + p is the product of the factors 1 + e, and p,
// kept without its 1, loses nothing where every e is tiny.
template <typename T>
struct TermSums {
  using Vec = typename Simd<T>::Vec;
  Vec p{}, relu{}, product{}, sigmoid{}, sigmoid_prod{};

  void add(const Term<T>& term, Vec s) {
    p = p * term.e + (p + term.e);
    relu += term.relu;
    product += s;
    sigmoid += term.sigmoid;
    sigmoid_prod += term.sigmoid * s;
  }

  // Adds up the lanes in double. Up to 64 factors a lane and 8 lanes a logarithm: at most 2^512.
  void flush(ClassSums& sums) {
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      sums.softplus += double(relu[lane]);
      sums.product += double(product[lane]);
      sums.sigmoid += double(sigmoid[lane]);
      sums.sigmoid_prod += double(sigmoid_prod[lane]);
    }
    for (int lane = 0; lane < kWidth<T>; lane += 8) {
      double q = 0;
      for (int l = lane; l < lane + 8 && l < kWidth<T>; ++l) q = q * double(p[l]) + (q + double(p[l]));
      sums.softplus += __builtin_log1p(q);
    }
    *this = TermSums{};
  }
};
constexpr int kFactorsPerLog = 64;

// The numbers a tile needs, in the arithmetic type.
// Gradient coefficients are divided by `unit`, the largest of them, which comes back in project_row():
// so a tiny weight 1/N^2 flushes nothing.
template <typename T>
struct Coefficients {
  T scale_p, scale_n, bias;
  T grad_p, grad_n, grad_l;
  T unit;

  explicit Coefficients(const LossParams& p) {
    auto abs = [](double v) { return v < 0 ? -v : v; };
    scale_p = T(p.scale_p);
    scale_n = T(p.scale_n);
    bias = T(p.bias);
    const double gp = p.weight_p * p.scale_p, gn = p.weight_n * p.scale_n;
    double u = abs(gp);
    if (abs(gn) > u) u = abs(gn);
    if (abs(p.weight_l) > u) u = abs(p.weight_l);
    const double inverse = u == 0 ? 0 : 1 / u;
    grad_p = T(-gp * inverse);
    grad_n = T(gn * inverse);
    grad_l = T(p.weight_l * inverse);
    unit = T(u);
  }
};

// A tile whose pairs are all negative: s [rows, cols] becomes dL/ds / unit in place.
template <typename T, bool kGrad>
void negative_tile(const Coefficients<T>& p, int64_t rows, int64_t cols, T* s, int64_t lds, ClassSums& sums) {
  using Vec = typename Simd<T>::Vec;
  constexpr int W = kWidth<T>;
  TermSums<T> acc;
  int factors = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; j += W) {
      T* at = s + i * lds + j;
      const Vec v = load(at);
      const Term<T> term(v * p.scale_n + p.bias);
      acc.add(term, v);
      if (kGrad) store(at, term.sigmoid * p.grad_n);
      if (++factors == kFactorsPerLog) {
        acc.flush(sums);
        factors = 0;
      }
    }
  acc.flush(sums);
  sums.count += double(rows) * double(cols);
}

// Where a tile lies, for tiles that a diagonal, a ragged edge or ids touch. All in tile coordinates.
template <typename T>
struct Pairs {
  using Lane = typename Simd<T>::Lane;
  const Lane* x_ids;   // of the tile's rows, or nullptr
  const Lane* y_ids;   // of the tile's columns, readable up to a whole vector
  T *x_pull, *y_pull;  // where dL/ds of a row's one positive goes, of the tile's rows and columns
  int64_t cols;        // columns of the tile that exist

  // Tile column of row i's positive and of its own column; out of range: not in this tile.
  Lane positive(int64_t i) const { return in_tile(offset + (row0 + i + shift) % m); }
  Lane self(int64_t i) const { return exclude_self ? in_tile(offset + row0 + i) : Lane(-1); }

  int64_t row0, col0, m, shift, offset;
  bool exclude_self;

 private:
  Lane in_tile(int64_t column) const {
    const int64_t j = column - col0;
    return j >= 0 && j < cols ? Lane(j) : Lane(-1);
  }
};

template <typename T>
struct LabelledSums {
  using Int = typename Simd<T>::Int;
  TermSums<T> positive, negative;
  Int n_positive{}, n_negative{};  // a true lane counts -1

  void flush(PairSums& sums) {
    positive.flush(sums.positive);
    negative.flush(sums.negative);
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      sums.positive.count -= double(n_positive[lane]);
      sums.negative.count -= double(n_negative[lane]);
    }
    *this = LabelledSums{};
  }
};

// A tile with positives, self pairs, missing columns or ids. A positive on the diagonal leaves 0 in s and its dL/ds
// with its row and its column.
template <typename T, bool kGrad>
void labelled_tile(const Coefficients<T>& p, const Pairs<T>& pairs, int64_t rows, T* s, int64_t lds, PairSums& sums) {
  using Vec = typename Simd<T>::Vec;
  using Int = typename Simd<T>::Int;
  using Lane = typename Simd<T>::Lane;
  constexpr int W = kWidth<T>;
  const Vec zero{};
  Int iota{};
  for (int lane = 0; lane < W; ++lane) iota[lane] = lane;
  LabelledSums<T> acc;
  int factors = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const Lane positive = pairs.x_ids ? Lane(-1) : pairs.positive(i);
    const Lane self = pairs.self(i);
    for (int64_t j = 0; j < pairs.cols; j += W) {
      T* at = s + i * lds + j;
      const Int column = iota + Lane(j);
      const Int keep = (column != self) & (column < Lane(pairs.cols));
      const Int same = pairs.x_ids ? Int(load_ids<T>(pairs.y_ids + j) == pairs.x_ids[i]) : Int(column == positive);
      const Int is_pos = keep & same, is_neg = keep & ~same;
      const Vec v = load(at);
      const Term<T> term(is_pos ? -(v * p.scale_p + p.bias) : v * p.scale_n + p.bias);
      acc.positive.add(Term<T>(term, is_pos), is_pos ? v : zero);
      acc.negative.add(Term<T>(term, is_neg), is_neg ? v : zero);
      acc.n_positive += is_pos;
      acc.n_negative += is_neg;
      if (kGrad) {
        const Vec g = term.sigmoid * (is_pos ? Vec{} + p.grad_p : Vec{} + p.grad_n);
        store(at, (is_pos | is_neg) ? g : zero);
      }
      if (++factors == kFactorsPerLog) {
        acc.flush(sums);
        factors = 0;
      }
    }
    if (kGrad && positive >= 0 && positive != self) {
      T& at = s[i * lds + positive];
      pairs.x_pull[i] = pairs.y_pull[positive] = at;
      at = 0;
    }
  }
  acc.flush(sums);
}

}  // namespace MIO_ISA
}  // namespace mio_ext
