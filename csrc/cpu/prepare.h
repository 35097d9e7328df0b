// SPDX-License-Identifier: Apache-2.0
// Rows as the matrix products want them, and the three products of a tile.
#include "terms.h"

namespace mio_ext {
namespace MIO_ISA {

template <typename T>
double sum_of_squares(const T* in, int64_t d) {
  double lanes[8] = {};
  int64_t c = 0;
  for (; c + 8 <= d; c += 8)
    for (int l = 0; l < 8; ++l) lanes[l] += double(in[c + l]) * double(in[c + l]);
  for (; c < d; ++c) lanes[c % 8] += double(in[c]) * double(in[c]);
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

// What every layout of a set of rows has: gradients, inverse norms, ids.
template <typename T>
struct PreparedBase {
  int64_t n, d, block, ld;             // ld: row stride, an odd number of vectors, so that rows do not share cache sets
  Buffer<T> inverse;                   // [n up to block] 1/max(|z|, eps), 0 where the gradient is 0; 1 without
                                       // normalisation
  Buffer<T> gradient;                  // [n up to block, ld] dL/drow / unit
  Buffer<T> pull;                      // [n up to block] dL/ds / unit of the row and its one positive, which is added
                                       // to the gradient unrounded, after the products; nothing where there are ids
  Buffer<typename Simd<T>::Lane> ids;  // [n up to block]

  int64_t allocate(int64_t count, int64_t dim, int64_t block_rows, bool grad, bool with_ids) {
    n = count, d = dim, block = block_rows;
    ld = odd_vectors(d);
    const int64_t padded = (n + block - 1) / block * block;
    inverse.allocate(padded);
    pull.allocate(padded);
    if (grad) gradient.allocate(padded * ld);
    if (with_ids) ids.allocate(padded);
    return padded;
  }

  static int64_t odd_vectors(int64_t elements) { return ((elements + kWidth<T> - 1) / kWidth<T> | 1) * kWidth<T>; }
  // Columns of a row that hold anything: whole vectors.
  int64_t width() const { return (d + kWidth<T> - 1) / kWidth<T> * kWidth<T>; }
};

// Features are multiplied in parts of this many, for the same reason as in register_block().
constexpr int64_t kFeatures = 128;

// Normalised rows in the arithmetic type.
template <typename T>
struct Prepared : PreparedBase<T> {
  using PreparedBase<T>::n, PreparedBase<T>::d, PreparedBase<T>::ld, PreparedBase<T>::inverse;
  using PreparedBase<T>::gradient, PreparedBase<T>::block;
  struct Scratch {
    void allocate(int64_t, int64_t) {}
  };
  Buffer<T> rows;    // [n up to block, ld], zero padded
  Buffer<T> panels;  // [n / kPanel up][d][kPanel]: the transpose, in panels; columns only

  void allocate(int64_t count, int64_t dim, int64_t block_rows, bool columns, bool grad, bool with_ids) {
    const int64_t padded = PreparedBase<T>::allocate(count, dim, block_rows, grad, with_ids);
    rows.allocate(padded * ld);
    if (columns) panels.allocate(padded * d);
  }

  // The block that begins with row `first`; z(i) is row i as it came, [d].
  template <class Rows>
  void prepare(const Rows& z, int64_t first, bool normalize) {
    for (int64_t i = first; i < first + block; i += kPanel<T>) prepare_panel(z, i, normalize);
  }

  template <class Rows>
  void prepare_panel(const Rows& z, int64_t first, bool normalize) {
    for (int64_t i = first; i < first + kPanel<T>; ++i) {
      T* row = rows.data() + i * ld;
      const T* in = i < n ? z(i) : nullptr;
      const double sum = normalize && i < n ? sum_of_squares(in, d) : 0;
      const double norm = __builtin_sqrt(sum);
      const double scale = !normalize ? 1 : 1 / (norm < kNormEps ? kNormEps : norm);
      inverse.data()[i] = normalize && norm <= kNormEps ? T(0) : T(scale);
      for (int64_t c = 0; c < d; ++c) row[c] = i < n ? T(in[c] * scale) : T(0);
      for (int64_t c = d; c < ld; ++c) row[c] = 0;
      if (gradient.data())
        for (int64_t c = 0; c < ld; ++c) gradient.data()[i * ld + c] = 0;
    }
    if (!panels.data()) return;
    T* panel = panels.data() + first * d;
    const T* row = rows.data() + first * ld;
    for (int64_t i = 0; i < kPanel<T>; i += kWidth<T>)
      for (int64_t c = 0; c < d; c += kWidth<T>)
        transpose(row + i * ld + c, ld, d - c, panel + c * kPanel<T> + i, kPanel<T>);
  }

  // s = x yT for the m rows of x from row0, the n rows of y from col0.
  static void logits(const Prepared& x, int64_t row0, int64_t m, const Prepared& y, int64_t col0, int64_t n, bool, T* s,
                     int64_t lds) {
    const int64_t d = x.d, n_padded = (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
    for (int64_t c = 0; c < d; c += kFeatures) {
      auto product = c == 0 ? gemm<T, T, false, false> : gemm<T, T, false, true>;
      product(m, n_padded, d - c < kFeatures ? d - c : kFeatures, x.rows.data() + row0 * x.ld + c, x.ld,
              y.panels.data() + col0 * d + c * kPanel<T>, kPanel<T> * d, kPanel<T>, s, lds);
    }
  }

  // dx += s y, dy += sT x where they are wanted. s is dL/ds / unit; `mean` is of no use here.
  static void gradients(Prepared& x, int64_t row0, int64_t m, Prepared& y, int64_t col0, int64_t n, bool dx, bool dy,
                        const T* s, int64_t lds, double /*mean*/, Scratch&) {
    if (dx)
      gemm<T, T, false, true>(m, y.width(), n, s, lds, y.rows.data() + col0 * y.ld, kPanel<T>, y.ld,
                              x.gradient.data() + row0 * x.ld, x.ld);
    if (dy)
      gemm<T, T, true, true>(n, x.width(), m, s, lds, x.rows.data() + row0 * x.ld, kPanel<T>, x.ld,
                             y.gradient.data() + col0 * y.ld, y.ld);
  }

  typename Simd<T>::Vec row_vector(int64_t i, int64_t c) const { return load(rows.data() + i * ld + c); }
};

}  // namespace MIO_ISA
}  // namespace mio_ext
