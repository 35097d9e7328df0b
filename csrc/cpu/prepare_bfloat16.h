// SPDX-License-Identifier: Apache-2.0
// The same for bfloat16 inputs where the machine multiplies pairs of bfloat16 (twice the rate of float32).
//
// The logits come from the inputs as they are, exactly: rows are normalised afterwards, on the logits. For
// the gradients sigma must be rounded to bfloat16. What is rounded is its distance from the tile's mean; the
// mean itself multiplies the sum of the block's rows, as one more row of the product, kept to 16 bits.
// That keeps the error below the rounding of a bfloat16 gradient where rows are spread so evenly that the
// sum over all of them almost vanishes.
//
// Two rows or columns of a pair lie 16 (a vector) apart, so that pairs are made lane by lane.
#include "prepare.h"

namespace mio_ext {
namespace MIO_ISA {

using PairVec = Simd<Pair>::Vec;
using FloatVec = Simd<float>::Vec;

inline FloatVec low_half(PairVec v) { return reinterpret_cast<FloatVec>(v << 16); }
inline FloatVec high_half(PairVec v) { return reinterpret_cast<FloatVec>(v & 0xffff0000u); }
// Rounds to nearest, ties away from zero; NaN stays NaN.
inline PairVec round_to_pair(FloatVec low, FloatVec high) {
  const PairVec l = reinterpret_cast<PairVec>(low) + 0x8000u, h = reinterpret_cast<PairVec>(high) + 0x8000u;
  return (l >> 16) | (h & 0xffff0000u);
}

struct PreparedBfloat16 : PreparedBase<float> {
  static constexpr int W = kWidth<float>;
  static_assert(kPanel<float> == 2 * W, "a panel holds the two vectors of a pair");

  Buffer<Pair> rows;         // [n up to block, pair_ld]: pairs along the features, times a power of two
  Buffer<Pair> panels;       // [n / kPanel up][feature_pairs][kPanel]: the transpose; columns only
  Buffer<Pair> row_pairs;    // [blocks][block / 2 + 1, ld]: pairs of rows, last the block's sum as high + low part
  Buffer<float> normalizer;  // [n up to block] what makes `rows` unit vectors
  int64_t feature_pairs, pair_ld;

  // A tile's derivative as pairs of columns and as pairs of rows.
  struct Scratch {
    Buffer<Pair> columns, rows;
    int64_t columns_ld, rows_ld;
    void allocate(int64_t row_block, int64_t col_block) {
      columns_ld = odd_vectors(col_block / 2 + 1), rows_ld = odd_vectors(col_block);
      columns.allocate(row_block * columns_ld);
      rows.allocate((row_block / 2 + W) * rows_ld);  // whole vectors of pairs can be read
    }
  };

  void allocate(int64_t count, int64_t dim, int64_t block_rows, bool columns, bool grad, bool with_ids) {
    const int64_t padded = PreparedBase<float>::allocate(count, dim, block_rows, grad, with_ids);
    feature_pairs = (d + 1) / 2, pair_ld = odd_vectors(feature_pairs);
    rows.allocate(padded * pair_ld);
    if (columns) panels.allocate(padded * feature_pairs);
    row_pairs.allocate(padded / block * (block / 2 + 1) * ld);
    normalizer.allocate(padded);
  }

  Pair* block_pairs(int64_t first) const {
    return const_cast<Pair*>(row_pairs.data()) + first / block * (block / 2 + 1) * ld;
  }
  // Rows of a block that exist, up to a panel.
  int64_t rows_of_block(int64_t first) const {
    const int64_t left = n - first < block ? n - first : block;
    return (left + kPanel<float> - 1) / kPanel<float> * kPanel<float>;
  }

  // The block that begins with row `first`; z(i) is row i as it came, [d].
  template <class Rows>
  void prepare(const Rows& z, int64_t first, bool normalize) {
    for (int64_t i = first; i < first + block; ++i) prepare_row(i < n ? z(i) : nullptr, i, normalize);
    for (int64_t i = first; i < first + block; i += kPanel<float>) {
      const Pair* in = rows.data() + i * pair_ld;
      if (panels.data())
        for (int64_t j = 0; j < kPanel<float>; j += W)
          for (int64_t c = 0; c < feature_pairs; c += W)
            transpose(in + j * pair_ld + c, pair_ld, feature_pairs - c,
                      panels.data() + i * feature_pairs + c * kPanel<float> + j, kPanel<float>);
      Pair* out = block_pairs(first) + (i - first) / 2 * ld;
      for (int64_t j = 0; j < W; ++j)
        for (int64_t c = 0; c < feature_pairs; ++c) {
          const Pair a = in[j * pair_ld + c], b = in[(j + W) * pair_ld + c];
          out[j * ld + 2 * c] = (a & 0xffffu) | b << 16;
          out[j * ld + 2 * c + 1] = a >> 16 | (b & 0xffff0000u);
        }
      for (int64_t j = 0; j < W; ++j)
        for (int64_t c = 2 * feature_pairs; c < ld; ++c) out[j * ld + c] = 0;
    }
    const int64_t count = rows_of_block(first);
    for (int64_t c = 0; c < ld; c += W) {
      FloatVec sum{};
      for (int64_t i = first; i < first + count; ++i) sum += row_vector(i, c);
      const FloatVec high = high_half(round_to_pair(sum, sum));
      store(block_pairs(first) + count / 2 * ld + c, round_to_pair(high, sum - high));
    }
  }

  void prepare_row(const float* in, int64_t i, bool normalize) {
    const double norm = normalize && i < n ? __builtin_sqrt(sum_of_squares(in, d)) : 0;
    const double scale = !normalize ? 1 : 1 / (norm < kNormEps ? kNormEps : norm);
    inverse.data()[i] = normalize && norm <= kNormEps ? 0.0f : float(scale);
    // A power of two, which is exact, keeps products of rows of any norm inside float32's range.
    const bool scalable = normalize && norm > kNormEps && norm < 1e30;
    const double power = scalable ? __builtin_ldexp(1.0, -__builtin_ilogb(norm)) : 1;
    normalizer.data()[i] = i < n ? float(scale / power) : 0.0f;
    auto bits = [&](int64_t c) {
      const float v = in[c] * float(power);
      Pair u;
      __builtin_memcpy(&u, &v, sizeof u);
      return u;
    };
    Pair* row = rows.data() + i * pair_ld;
    const int64_t whole = i < n ? d / 2 : 0;
    for (int64_t c = 0; c < whole; ++c) row[c] = bits(2 * c) >> 16 | (bits(2 * c + 1) & 0xffff0000u);
    for (int64_t c = whole; c < feature_pairs; ++c) row[c] = i < n ? bits(2 * c) >> 16 : 0;
    if (gradient.data())
      for (int64_t c = 0; c < ld; ++c) gradient.data()[i * ld + c] = 0;
  }

  // Features [c, c + W) of normalised row i.
  FloatVec row_vector(int64_t i, int64_t c) const {
    const int64_t in_block = i & (block - 1), in_panel = in_block % kPanel<float>;  // a power of two
    const int64_t pair = in_block / kPanel<float> * W + in_panel % W;
    const PairVec v = load(block_pairs(i - in_block) + pair * ld + c);
    return (in_panel < W ? low_half(v) : high_half(v)) * normalizer.data()[i];
  }

  static void logits(const PreparedBfloat16& x, int64_t row0, int64_t m, const PreparedBfloat16& y, int64_t col0,
                     int64_t n, bool normalize, float* s, int64_t lds) {
    constexpr int64_t kPart = kFeatures / 2;
    const int64_t d = x.feature_pairs, n_padded = (n + kPanel<float> - 1) / kPanel<float> * kPanel<float>;
    for (int64_t c = 0; c < d; c += kPart) {
      auto product = c == 0 ? gemm<float, Pair, false, false> : gemm<float, Pair, false, true>;
      product(m, n_padded, d - c < kPart ? d - c : kPart, x.rows.data() + row0 * x.pair_ld + c, x.pair_ld,
              y.panels.data() + col0 * d + c * kPanel<float>, kPanel<float> * d, kPanel<float>, s, lds);
    }
    if (!normalize) return;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n_padded; j += W)
        store(s + i * lds + j,
              load(s + i * lds + j) * (x.normalizer.data()[row0 + i] * load(y.normalizer.data() + col0 + j)));
  }

  // dx += s y, dy += sT x where they are wanted. s is dL/ds / unit and `mean` its typical value.
  static void gradients(PreparedBfloat16& x, int64_t row0, int64_t m, PreparedBfloat16& y, int64_t col0, int64_t n,
                        bool dx, bool dy, const float* s, int64_t lds, double mean, Scratch& scratch) {
    const int64_t rows = x.rows_of_block(row0), cols = y.rows_of_block(col0);
    const PairVec means = round_to_pair(FloatVec{} + float(mean), FloatVec{} + float(mean));
    const FloatVec center = low_half(means);
    auto tile_vector = [&](int64_t i, int64_t j) {
      return i < m ? load(s + i * lds + j) - center : FloatVec{};  // rows beyond the tile hold anything
    };
    for (int64_t i0 = 0; i0 < rows; i0 += kPanel<float>)
      for (int64_t i = i0; i < i0 + W; ++i) {
        const float x_low = x.normalizer.data()[row0 + i], x_high = x.normalizer.data()[row0 + i + W];
        Pair* columns = scratch.columns.data() + i * scratch.columns_ld;
        Pair* pairs = scratch.rows.data() + (i0 / 2 + i - i0) * scratch.rows_ld;
        for (int64_t j = 0; j < cols; j += kPanel<float>) {
          const FloatVec y_low = load(y.normalizer.data() + col0 + j),
                         y_high = load(y.normalizer.data() + col0 + j + W);
          const FloatVec s00 = tile_vector(i, j), s01 = tile_vector(i, j + W);
          const FloatVec s10 = tile_vector(i + W, j), s11 = tile_vector(i + W, j + W);
          store(columns + j / 2, round_to_pair(s00 * y_low, s01 * y_high));
          store(columns + W * scratch.columns_ld + j / 2, round_to_pair(s10 * y_low, s11 * y_high));
          store(pairs + j, round_to_pair(s00 * x_low, s10 * x_high));
          store(pairs + j + W, round_to_pair(s01 * x_low, s11 * x_high));
        }
        columns[cols / 2] = columns[W * scratch.columns_ld + cols / 2] = means[0];
      }
    for (int64_t j = 0; j < cols; j += W) store(scratch.rows.data() + rows / 2 * scratch.rows_ld + j, means);
    if (dx)
      gemm<float, Pair, false, true>(m, y.width(), cols / 2 + 1, scratch.columns.data(), scratch.columns_ld,
                                     y.block_pairs(col0), kPanel<float>, y.ld, x.gradient.data() + row0 * x.ld, x.ld);
    if (dy)
      gemm<float, Pair, true, true>(n, x.width(), rows / 2 + 1, scratch.rows.data(), scratch.rows_ld,
                                    x.block_pairs(row0), kPanel<float>, x.ld, y.gradient.data() + col0 * y.ld, y.ld);
  }
};

}  // namespace MIO_ISA
}  // namespace mio_ext
