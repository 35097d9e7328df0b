// SPDX-License-Identifier: Apache-2.0
// One sweep over all tiles of rows x columns. Fused: the logits of a tile, their loss, sigmoid and
// statistics, and the tile's share of both gradients; a tile of logits lives only in the cache of the
// thread that works on it.
#if defined(MIO_BFLOAT16)
#include "prepare_bfloat16.h"
#else
#include "prepare.h"
#endif
#include "linear.h"

namespace mio_ext {
namespace MIO_ISA {

// Layout: Prepared<T>, or PreparedBfloat16 where T is float.
template <typename T, typename Layout>
class Sweep {
  using Vec = typename Simd<T>::Vec;
  static constexpr int W = kWidth<T>;

 public:
  explicit Sweep(const PairwiseBCE<T>& problem)
      : in_(problem),
        symmetric_(problem.y == nullptr),
        coefficients_(problem.params),
        row_block_(block_size(problem.m, problem.d)),
        col_block_(block_size(symmetric_ ? problem.m : problem.k, problem.d)) {
    const bool ids = problem.x_ids != nullptr;
    x_.allocate(in_.m, in_.d, row_block_, symmetric_, in_.dx != nullptr, ids);
    if (!symmetric_) y_.allocate(in_.k, in_.d, col_block_, true, in_.dy != nullptr, ids);
  }

  // Row blocks own the sums of their tiles: added in the order of the schedule, not of the threads.
  PairSums run(int threads, const ParallelFor& parallel) {
    if (in_.x_ids) {
      const Ranks ranks(in_.x_ids, in_.m, in_.y_ids, symmetric_ ? 0 : in_.k);
      for (int64_t i = 0; i < in_.m; ++i) x_.ids.data()[i] = ranks(in_.x_ids[i]);
      for (int64_t j = 0; !symmetric_ && j < in_.k; ++j) y_.ids.data()[j] = ranks(in_.y_ids[j]);
      ids_ = ranks.size();
    }
    const int64_t row_blocks = (in_.m + row_block_ - 1) / row_block_;
    const int64_t col_blocks = (columns().n + col_block_ - 1) / col_block_;
    std::vector<PairSums> sums(row_blocks);
    Schedule schedule(row_blocks, col_blocks, symmetric_, threads);
    parallel(threads, [&](int) {
      Buffer<T> logits;
      logits.allocate(row_block_ * tile_ld());
      typename Layout::Scratch scratch;
      scratch.allocate(row_block_, col_block_);
      schedule.work(
          [&](Schedule::Side side, int64_t block) {
            if (side == Schedule::kRows)
              x_.prepare([&](int64_t i) { return in_.x_row(i); }, block * row_block_, in_.normalize);
            else
              y_.prepare([&](int64_t j) { return in_.y + j * in_.d; }, block * col_block_, in_.normalize);
          },
          [&](int64_t row, int64_t col) {
            tile(row * row_block_, col * col_block_, logits.data(), scratch, sums[row]);
          },
          [&](Schedule::Side side, int64_t block) {
            if (side == Schedule::kRows)
              sums[block].distance = project_block(x_, columns(), block * row_block_, in_.dx);
            else if (in_.dy)
              project_block(y_, x_, block * col_block_, in_.dy);
          });
    });

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

  int64_t tile_ld() const { return col_block_ + kWidth<T>; }  // an odd number of vectors
  Layout& columns() { return symmetric_ ? x_ : y_; }

  // A block of x or y when all its tiles are done: its gradient, where that is wanted, and half the squared distances
  // of its positive pairs. `others` are the rows it was paired with.
  double project_block(Layout& rows, const Layout& others, int64_t first, T* out) {
    if (in_.x_ids) std::call_once(classes_gathered_, [this] { gather_classes(); });
    double distances = 0;
    for (int64_t i = first; i < rows.n && i < first + rows.block; ++i) {
      T* const out_i = out ? out + i * rows.d : nullptr;
      distances +=
          in_.x_ids ? project_in_class(rows, others, i, out_i) : project_beside_partner(rows, others, i, out_i);
    }
    return distances;
  }

  // A function: GCC compiles a lambda of this form without the instruction set it stands among.
  static Vec nothing(int64_t) { return Vec{}; }

  double project_beside_partner(Layout& rows, const Layout& others, int64_t i, T* out) const {
    const int64_t partner = positive(rows, i);
    if (partner < 0) {
      project_row(rows, i, nothing, out);
      return 0;
    }
    const T pull = rows.pull.data()[i];
    Vec squares{};
    auto of_partner = [&](int64_t c) {
      const Vec theirs = others.row_vector(partner, c), difference = rows.row_vector(i, c) - theirs;
      squares += difference * difference;
      return pull * theirs + coefficients_.grad_l * difference;
    };
    project_row(rows, i, of_partner, out);
    return sum_of_lanes<T>(squares) / 2;
  }

  double project_in_class(Layout& rows, const Layout& others, int64_t i, T* out) const {
    const auto others_alike = (&rows == &x_ ? column_classes_ : row_classes_)[rows.ids.data()[i]];
    auto from_mean = [&](int64_t c) { return rows.row_vector(i, c) - load(others_alike.mean + c); };
    auto rest = [&](int64_t c) { return load(others_alike.rest + c); };
    auto to_class = [&](int64_t c) { return coefficients_.grad_l * (others_alike.count * from_mean(c) - rest(c)); };
    const double distances = others_alike.count * dot<T>(rows.d, from_mean, from_mean) / 2 -
                             dot<T>(rows.d, from_mean, rest) + others_alike.spread;
    const int64_t self = excluded(rows, others, i);
    if (self < 0) {
      project_row(rows, i, to_class, out);
      return distances;
    }
    auto to_self = [&](int64_t c) { return rows.row_vector(i, c) - others.row_vector(self, c); };
    project_row(rows, i, [&](int64_t c) { return to_class(c) - coefficients_.grad_l * to_self(c); }, out);
    return distances - dot<T>(rows.d, to_self, to_self) / 2;
  }

  void gather_classes() {
    column_classes_.gather(columns(), ids_);
    if (in_.dy) row_classes_.gather(x_, ids_);
  }

  // The one positive of row i of a side, among those of the other; -1: it has none.
  int64_t positive(const Layout& rows, int64_t i) const {
    if (in_.exclude_self && in_.shift == 0) return -1;
    if (&rows == &x_) {
      const int64_t j = in_.offset + (i + in_.shift) % in_.m;
      return j < in_.k ? j : -1;
    }
    const int64_t own = i - in_.offset;
    return own >= 0 && own < in_.m ? (own - in_.shift + in_.m) % in_.m : -1;
  }

  // The row that row i of a side shares an id with and is yet no pair with; -1: there is none. Where y = x it is i
  // itself, at a distance of 0.
  int64_t excluded(const Layout& rows, const Layout& others, int64_t i) const {
    if (!in_.exclude_self || symmetric_) return -1;
    const int64_t self = &rows == &x_ ? in_.offset + i : i - in_.offset;
    return self >= 0 && self < others.n && others.ids.data()[self] == rows.ids.data()[i] ? self : -1;
  }

  // Eq. (10) for row i: out [d] = (g - (row . g) row) times unit and inverse norm, g being what the products have left
  // of (9) and `rest`, which is asked for once. Where y = x every row is in both roles, and G is symmetric: twice that.
  template <class Rest>
  void project_row(Layout& rows, int64_t i, const Rest& rest, T* out) const {
    if (!out) {
      for (int64_t c = 0; c < rows.d; c += W) rest(c);
      return;
    }
    T* g = rows.gradient.data() + i * rows.ld;
    Vec lanes{};
    for (int64_t c = 0; c < rows.d; c += W) {
      const Vec v = load(g + c) + rest(c);
      if (in_.normalize) lanes += v * rows.row_vector(i, c);
      store(g + c, v);
    }
    const T along = T(sum_of_lanes<T>(lanes));
    const T scale = coefficients_.unit * (symmetric_ ? 2 : 1) * rows.inverse.data()[i];
    for (int64_t c = 0; c < rows.d; c += W) {
      Vec v = load(g + c);
      if (in_.normalize) v -= along * rows.row_vector(i, c);
      v *= scale;
      if (c + W <= rows.d)
        __builtin_memcpy(out + c, &v, sizeof v);
      else
        for (int lane = 0; c + lane < rows.d; ++lane) out[c + lane] = v[lane];
    }
  }

  // Layout [row0, row0 + row_block) against columns [col0, col0 + col_block).
  void tile(int64_t row0, int64_t col0, T* s, typename Layout::Scratch& scratch, PairSums& sums) {
    Layout& cols = columns();
    const int64_t lds = tile_ld();
    const int64_t m = in_.m - row0 < row_block_ ? in_.m - row0 : row_block_;
    const int64_t n = cols.n - col0 < col_block_ ? cols.n - col0 : col_block_;
    // s = x yT
    Layout::logits(x_, row0, m, cols, col0, n, in_.normalize, s, lds);
    // s becomes the loss's derivative
    const bool diagonal = symmetric_ && row0 == col0;
    PairSums tile_sums;
    const bool grad = in_.dx || in_.dy;
    grad ? terms<true>(row0, col0, m, n, s, tile_sums) : terms<false>(row0, col0, m, n, s, tile_sums);
    // y = x: a tile off the diagonal stands for its mirror image too.
    sums.add(tile_sums, symmetric_ && !diagonal ? 2 : 1);
    // dx += s y, dy += sT x
    const ClassSums& negative = tile_sums.negative;
    const double mean = negative.count > 0 ? coefficients_.grad_n * negative.sigmoid / negative.count : 0;
    if (grad)
      Layout::gradients(x_, row0, m, cols, col0, n, in_.dx != nullptr, cols.gradient.data() && !diagonal, s, lds, mean,
                        scratch);
  }

  template <bool kGrad>
  void terms(int64_t row0, int64_t col0, int64_t rows, int64_t cols, T* s, PairSums& sums) {
    const Layout& columns = this->columns();
    if (!in_.x_ids && cols % kWidth<T> == 0 && !diagonals_touch(row0, col0, rows, cols))
      return negative_tile<T, kGrad>(coefficients_, rows, cols, s, tile_ld(), sums.negative);
    Pairs<T> pairs;
    pairs.x_ids = in_.x_ids ? x_.ids.data() + row0 : nullptr;
    pairs.y_ids = in_.x_ids ? columns.ids.data() + col0 : nullptr;
    pairs.x_pull = x_.pull.data() + row0;
    pairs.y_pull = this->columns().pull.data() + col0;
    pairs.cols = cols;
    pairs.row0 = row0, pairs.col0 = col0;
    pairs.m = in_.m, pairs.shift = in_.shift, pairs.offset = in_.offset;
    pairs.exclude_self = in_.exclude_self;
    labelled_tile<T, kGrad>(coefficients_, pairs, rows, s, tile_ld(), sums);
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
  const Coefficients<T> coefficients_;
  const int64_t row_block_, col_block_;
  Layout x_, y_;
  int64_t ids_ = 0;  // different ones
  std::once_flag classes_gathered_;
  Classes<T> column_classes_, row_classes_;
};

template <typename T>
PairSums run(const PairwiseBCE<T>& problem, int threads, const ParallelFor& parallel) {
#if defined(MIO_BFLOAT16)
  // With few columns the rounding of their σ does not average out, and there is nothing to gain. Nor does it with ids,
  // whose positives, unlike those on a diagonal, are among what is rounded.
  if constexpr (std::is_same_v<T, float>)
    if (problem.bfloat16 && !problem.x_ids && std::min(problem.m, problem.k) >= 64)
      return Sweep<T, PreparedBfloat16>(problem).run(threads, parallel);
#endif
  return Sweep<T, Prepared<T>>(problem).run(threads, parallel);
}

}  // namespace MIO_ISA
}  // namespace mio_ext

#undef MIO_ISA
#undef MIO_VECTOR_BYTES
#undef MIO_MR
#undef MIO_NV
#undef MIO_BFLOAT16
