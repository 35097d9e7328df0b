// SPDX-License-Identifier: Apache-2.0
// One pass over all tiles of rows x columns. Fused: the logits of a tile, their loss, sigmoid and
// statistics, and the tile's share of both gradients; a tile of logits lives only in the cache of the
// thread that works on it.
#include "pairwise_bce_kernel.h"

namespace mio_ext {
namespace MIO_ISA {

// A set of rows in the two layouts the products want, normalised, plus what eq. (10) needs later.
template <typename T>
struct Packed {
  int64_t n, d, ld;                    // ld: row stride, an odd number of vectors, so that rows do not share cache sets
  Buffer<T> rows;                      // [n up to block, ld], zero padded
  Buffer<T> panels;                    // [n / kPanel up][d][kPanel]: the transpose, in panels; columns only
  Buffer<T> inverse;                   // [n] 1/max(|z|, eps), 0 where the gradient is 0; 1 without normalisation
  Buffer<T> norm2;                     // [n up to block] |row|^2 after normalisation
  Buffer<T> gradient;                  // [n up to block, ld] dL/drow / unit
  Buffer<typename Simd<T>::Lane> ids;  // [n up to block]

  void allocate(int64_t count, int64_t dim, int64_t block, bool columns, bool grad, bool with_ids) {
    n = count, d = dim;
    ld = (width() / kWidth<T> | 1) * kWidth<T>;
    const int64_t padded = (n + block - 1) / block * block;
    rows.allocate(padded * ld);
    if (columns) panels.allocate(padded * d);
    inverse.allocate(padded);
    norm2.allocate(padded);
    if (grad) gradient.allocate(padded * ld);
    if (with_ids) ids.allocate(padded);
  }

  // Columns of a row that hold anything: whole vectors.
  int64_t width() const { return (d + kWidth<T> - 1) / kWidth<T> * kWidth<T>; }

  // Rows [first, first + kPanel) of z [n, d].
  void pack(const T* z, int64_t first, bool normalize) {
    for (int64_t i = first; i < first + kPanel<T>; ++i) {
      T* row = rows.data() + i * ld;
      const T* in = z + i * d;
      double sum = 0;
      if (i < n) sum = sum_of_squares(in);
      const double norm = __builtin_sqrt(sum);
      const double scale = !normalize ? 1 : 1 / (norm < kNormEps ? kNormEps : norm);
      inverse.data()[i] = normalize && norm <= kNormEps ? T(0) : T(scale);
      norm2.data()[i] = T(sum * scale * scale);
      for (int64_t c = 0; c < d; ++c) row[c] = i < n ? T(in[c] * scale) : T(0);
      for (int64_t c = d; c < ld; ++c) row[c] = 0;
      if (gradient.data())
        for (int64_t c = 0; c < ld; ++c) gradient.data()[i * ld + c] = 0;
    }
    if (!panels.data()) return;
    T* panel = panels.data() + first * d;
    const T* row = rows.data() + first * ld;
    for (int64_t c = 0; c < d; ++c)
      for (int64_t i = 0; i < kPanel<T>; ++i) panel[c * kPanel<T> + i] = row[i * ld + c];
  }

  double sum_of_squares(const T* in) const {
    double lanes[8] = {};
    int64_t c = 0;
    for (; c + 8 <= d; c += 8)
      for (int l = 0; l < 8; ++l) lanes[l] += double(in[c + l]) * double(in[c + l]);
    for (; c < d; ++c) lanes[c % 8] += double(in[c]) * double(in[c]);
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
  }

  // Eq. (10): out [d] = unit inverse (g - (row . g) row), for row i.
  void finish(int64_t i, T unit, bool normalize, T* out) const {
    const T* g = gradient.data() + i * ld;
    const T* row = rows.data() + i * ld;
    T along = 0;
    if (normalize) {
      T lanes[16] = {};
      for (int64_t c = 0; c < ld; c += kWidth<T>)
        for (int l = 0; l < kWidth<T>; ++l) lanes[l] += g[c + l] * row[c + l];
      for (T lane : lanes) along += lane;
    }
    const T scale = unit * inverse.data()[i];
    for (int64_t c = 0; c < d; ++c) out[c] = scale * (g[c] - along * row[c]);
  }
};

template <typename T>
class Pass {
 public:
  explicit Pass(const PairwiseBCE<T>& problem)
      : in_(problem),
        symmetric_(problem.y == nullptr),
        params_(problem.params),
        row_block_(block_size(problem.m, problem.d)),
        col_block_(block_size(symmetric_ ? problem.m : problem.k, problem.d)) {
    const bool ids = problem.x_ids != nullptr;
    x_.allocate(in_.m, in_.d, row_block_, symmetric_, in_.dx != nullptr, ids);
    if (!symmetric_) y_.allocate(in_.k, in_.d, col_block_, true, in_.dy != nullptr, ids);
  }

  // Row blocks own the sums of their tiles: added in the order of the schedule, not of the threads.
  PairSums run(int threads, const Parallel& parallel) {
    each_panel(threads, parallel, x_, in_.x);
    if (!symmetric_) each_panel(threads, parallel, y_, in_.y);
    if (in_.x_ids) {
      const Ranks ranks(in_.x_ids, in_.m, in_.y_ids, symmetric_ ? 0 : in_.k);
      for (int64_t i = 0; i < in_.m; ++i) x_.ids.data()[i] = ranks(in_.x_ids[i]);
      for (int64_t j = 0; !symmetric_ && j < in_.k; ++j) y_.ids.data()[j] = ranks(in_.y_ids[j]);
    }

    const int64_t row_blocks = (in_.m + row_block_ - 1) / row_block_;
    const int64_t col_blocks = (columns().n + col_block_ - 1) / col_block_;
    std::vector<PairSums> sums(row_blocks);
    Schedule schedule(row_blocks, col_blocks, symmetric_);
    parallel(threads, [&](int) {
      Buffer<T> logits;
      logits.allocate(row_block_ * tile_ld());
      for (;;) {
        const Schedule::Task task = schedule.take();
        if (task.round < 0) break;
        if (task.row < row_blocks && task.col < col_blocks)
          tile(task.row * row_block_, task.col * col_block_, logits.data(), sums[task.row]);
        schedule.done(task);
      }
    });
    each_row(threads, parallel, x_, in_.dx);
    if (!symmetric_) each_row(threads, parallel, y_, in_.dy);

    PairSums total;
    for (const PairSums& s : sums) total.add(s, 1);
    return total;
  }

 private:
  // From the size alone, so that the bits do not depend on the number of threads: enough blocks to keep
  // threads busy, and large ones where the operands outgrow the last cache (measured, docs/performance.md).
  static int64_t block_size(int64_t n, int64_t d) {
    if (n <= 256) return 32;
    if (n <= 512) return 64;
    return n >= 4096 && n * d > (int64_t{1} << 20) ? 256 : 128;
  }
  static_assert(32 % kPanel<T> == 0 && kPanel<T> % MIO_MR == 0,
                "blocks are whole panels, panels whole register blocks");

  static constexpr int64_t kFeatures = 128;

  int64_t tile_ld() const { return col_block_ + kWidth<T>; }  // an odd number of vectors
  Packed<T>& columns() { return symmetric_ ? x_ : y_; }

  void each_panel(int threads, const Parallel& parallel, Packed<T>& packed, const T* z) {
    const int64_t padded = (packed.n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
    std::atomic<int64_t> next{0};
    parallel(threads, [&](int) {
      for (int64_t i; (i = next.fetch_add(kPanel<T>)) < padded;) packed.pack(z, i, in_.normalize);
    });
  }

  // Where y = x every row is in both roles, and G is symmetric: twice the row gradient, eq. (9).
  void each_row(int threads, const Parallel& parallel, const Packed<T>& packed, T* out) {
    if (!out) return;
    std::atomic<int64_t> next{0};
    constexpr int64_t kRows = 64;
    parallel(threads, [&](int) {
      for (int64_t first; (first = next.fetch_add(kRows)) < packed.n;)
        for (int64_t i = first; i < packed.n && i < first + kRows; ++i)
          packed.finish(i, params_.unit * (symmetric_ ? 2 : 1), in_.normalize, out + i * packed.d);
    });
  }

  // Rows [row0, row0 + row_block) against columns [col0, col0 + col_block).
  void tile(int64_t row0, int64_t col0, T* s, PairSums& sums) {
    Packed<T>& cols = columns();
    const int64_t d = in_.d, lds = tile_ld();
    const int64_t m = in_.m - row0 < row_block_ ? in_.m - row0 : row_block_;
    const int64_t n = cols.n - col0 < col_block_ ? cols.n - col0 : col_block_;
    const int64_t n_padded = (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
    // s = x yT, summed over the features in parts, for the same reason as in register_block()
    for (int64_t c = 0; c < d; c += kFeatures) {
      auto product = c == 0 ? gemm<T, false, false> : gemm<T, false, true>;
      product(m, n_padded, d - c < kFeatures ? d - c : kFeatures, x_.rows.data() + row0 * x_.ld + c, x_.ld,
              cols.panels.data() + col0 * d + c * kPanel<T>, kPanel<T> * d, kPanel<T>, s, lds);
    }
    // s becomes the loss's derivative
    const bool diagonal = symmetric_ && row0 == col0;
    PairSums tile_sums;
    const bool grad = in_.dx || in_.dy;
    grad ? terms<true>(row0, col0, m, n, s, tile_sums) : terms<false>(row0, col0, m, n, s, tile_sums);
    // y = x: a tile off the diagonal stands for its mirror image too.
    sums.add(tile_sums, symmetric_ && !diagonal ? 2 : 1);
    // dx += s y, dy += sT x
    if (in_.dx)
      gemm<T, false, true>(m, cols.width(), n, s, lds, cols.rows.data() + col0 * cols.ld, kPanel<T>, cols.ld,
                           x_.gradient.data() + row0 * x_.ld, x_.ld);
    if (cols.gradient.data() && !diagonal)
      gemm<T, true, true>(n, x_.width(), m, s, lds, x_.rows.data() + row0 * x_.ld, kPanel<T>, x_.ld,
                          cols.gradient.data() + col0 * cols.ld, cols.ld);
  }

  template <bool kGrad>
  void terms(int64_t row0, int64_t col0, int64_t rows, int64_t cols, T* s, PairSums& sums) {
    const Packed<T>& columns = this->columns();
    if (!in_.x_ids && cols % kWidth<T> == 0 && !diagonals_touch(row0, col0, rows, cols))
      return negative_tile<T, kGrad>(params_, rows, cols, s, tile_ld(), sums.negative);
    TileLabels<T> labels;
    labels.x_ids = in_.x_ids ? x_.ids.data() + row0 : nullptr;
    labels.y_ids = in_.x_ids ? columns.ids.data() + col0 : nullptr;
    labels.x_norm2 = x_.norm2.data() + row0;
    labels.y_norm2 = columns.norm2.data() + col0;
    labels.cols = cols;
    labels.row0 = row0, labels.col0 = col0;
    labels.m = in_.m, labels.shift = in_.shift, labels.offset = in_.offset;
    labels.exclude_self = in_.exclude_self;
    labelled_tile<T, kGrad>(params_, labels, rows, s, tile_ld(), sums);
  }

  // Does the diagonal of positives or of self pairs cross this tile?
  bool diagonals_touch(int64_t row0, int64_t col0, int64_t rows, int64_t cols) const {
    auto overlap = [&](int64_t first, int64_t count) {  // columns [first, first + count)
      return first < col0 + cols && col0 < first + count;
    };
    if (in_.exclude_self && overlap(in_.offset + row0, rows)) return true;
    const int64_t first = (row0 + in_.shift) % in_.m;
    const int64_t until_wrap = rows < in_.m - first ? rows : in_.m - first;
    return overlap(in_.offset + first, until_wrap) || (rows > until_wrap && overlap(in_.offset, rows - until_wrap));
  }

  const PairwiseBCE<T>& in_;
  const bool symmetric_;
  const TileParams<T> params_;
  const int64_t row_block_, col_block_;
  Packed<T> x_, y_;
};

template <typename T>
PairSums run(const PairwiseBCE<T>& problem, int threads, const Parallel& parallel) {
  return Pass<T>(problem).run(threads, parallel);
}

}  // namespace MIO_ISA
}  // namespace mio_ext

#undef MIO_ISA
#undef MIO_VECTOR_BYTES
#undef MIO_MR
#undef MIO_NV
