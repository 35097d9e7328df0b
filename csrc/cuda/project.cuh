// SPDX-License-Identifier: Apache-2.0
// The end of a sweep: the parts of the rows' gradient come together, their positive pairs are added in float32, and the
// gradient is projected through the norm, eq. (10).
#pragma once

#include <type_traits>

#include "prepare.cuh"
#include "terms.cuh"

namespace mio_ext {

// The one positive pair of a row without ids, from its unit vectors, eight features at a time, over kLanes lanes: first
// its sums, then its part of the gradient by x^,
//     w_l (x^ - y^) - w_p a_p sigma y^,
// eq. (7). The difference is taken feature by feature: where the views agree it is small, and what -w_l y^ leaves of it
// after the projection (10) would be rounding.
struct PositivePair {
  float product = 0, distance = 0;
  float weight = 0;  // w_p a_p sigma

  MIO_DEVICE void add(const float (&x)[8], const float (&y)[8]) {
    float difference[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) difference[i] = x[i] - y[i];
    product += dot_eight(x, y);
    distance += dot_eight(difference, difference);
  }

  template <int kLanes>
  MIO_DEVICE void sum_up() {
    product = sum_lanes<kLanes>(product);
    distance = 0.5f * sum_lanes<kLanes>(distance);
  }

  MIO_DEVICE void to(PairSums& out, const Coefficients& coefficients) {
    const Term term(-(product * coefficients.p + coefficients.bias));
    out.positive.count += 1;
    out.positive.softplus += kLn2 * (term.relu + log2_1p(term.e));
    out.positive.product += product;
    out.positive.sigmoid += term.sigmoid;
    out.positive.sigmoid_prod += term.sigmoid * product;
    out.distance += distance;
    weight = coefficients.weight_p * term.sigmoid;
  }

  MIO_DEVICE void add_gradient(float (&g)[8], const float (&x)[8], const float (&y)[8],
                               const Coefficients& coefficients) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] += coefficients.weight_l * (x[i] - y[i]) - weight * y[i];
  }
};

// What a sweep is given.
struct Sweep {
  Prepare prepare;
  bool prepares;  // what is in `prepare` is to be prepared first; only if `together`
  bool together;  // all blocks run at a time, and may wait for each other
  Prepared rows, cols;
  int side;  // of the rows, in `prepare`
  Pairs pairs;
  Results results;
  int d;
  bool normalize;
  bool loss;             // sum up the loss too; a second sweep, for dy, need not
  float gradient_times;  // 2 where y = x: G is symmetric, eq. (9)
  float* grad;           // [n, d] or nullptr
  float* partial;        // [splits, n, d] the gradient's parts; `grad` itself if there is one split
  int tiles_per_split, splits;
  PairSums* records;  // [splits + 1, row blocks], or [splits slices, row blocks] if `together`
  unsigned* tickets;  // [1 + row blocks], zero
};

// The sums of the rows' gradient parts, their positive pairs, and eq. (10). kRowLanes lanes to a row, eight features
// at a time.
template <class A, class T, bool kIds>
struct RowProjection {
  static constexpr int kGroups = T::kWidth / (8 * kRowLanes), kAtATime = T::kThreads / kRowLanes;
  using Row = float[kGroups][8];
  const Sweep& in;
  const Coefficients& coefficients;
  const float acc_weight;  // of what is in `partial`
  const int thread = fresh_thread_index(), lane = thread % kRowLanes;
  const bool aligned = rows_are_aligned(in.grad, in.d) && rows_are_aligned(in.partial, in.d);

  // Rows row0 to end - 1, which may not all exist. All lanes of a warp take part in its sums, whether they have a row
  // or not.
  MIO_DEVICE PairSums rows(int row0, int end) const {
    PairSums out;
    for (int first = row0; first < end; first += kAtATime) {
      const int row = first + thread / kRowLanes;
      const bool there = row < end && row < in.rows.n;
      this->row(there ? row : row0, there, out);
    }
    return lane == 0 ? out : PairSums();
  }

 private:
  MIO_DEVICE static int feature(int lane, int group) { return 8 * (lane + group * kRowLanes); }

  MIO_DEVICE void row(int row, bool there, PairSums& out) const {
    Row x, g = {};
    load(x, in.rows, in.side, row);
    if (in.grad && there) add_parts(g, row);
    if constexpr (!kIds) {
      positive_pair(g, x, row, there, out);
    }
    if (in.grad) project(g, x, row, there);
  }

  // The unit vector (1): of float32 features from these themselves, of which the copy has lost some bits.
  MIO_DEVICE void load(Row& x, const Prepared& from, int side, int row) const {
    const float inverse = from.inverse[row];
    if constexpr (std::is_same_v<typename A::Feature, float>) {
      const float back = from.back[row];
      const float times = back != 0 || inverse == 0 ? back : float(1 / kNormEps);
      const FeatureRow<float> features(in.prepare, side, row);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        features.eight(x[i], feature(lane, i));
#pragma unroll
        for (int j = 0; j < 8; ++j) x[i][j] = rounded_product(x[i][j], times);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroups; ++i)
        unit_eight<A>(x[i], from, T::kLayout, row, T::kWidth, feature(lane, i), inverse);
    }
  }

  MIO_DEVICE void add_parts(Row& g, int row) const {
    aligned ? add_parts_as<true>(g, row) : add_parts_as<false>(g, row);
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) g[i][j] *= acc_weight;
  }
  template <bool kAligned>
  MIO_DEVICE void add_parts_as(Row& g, int row) const {
    const float* at = in.partial + int64_t(row) * in.d;
#pragma unroll(kAligned ? 4 : 1)
    for (int s = 0; s < in.splits; ++s, at += int64_t(in.rows.n) * in.d)
#pragma unroll
      for (int i = 0; i < kGroups; ++i) add_row_eight<kAligned>(g[i], at, feature(lane, i), in.d);
  }

  // At most one a row, and what is left is negative.
  MIO_DEVICE void positive_pair(Row& g, const Row& x, int row, bool there, PairSums& out) const {
    const int column = in.pairs.positive(row);
    Row y;
    load(y, in.cols, in.prepare.sides == 2 ? 1 - in.side : 0, column < 0 ? 0 : column);
    PositivePair pair;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) pair.add(x[i], y[i]);
    pair.sum_up<kRowLanes>();
    if (!there) return;
    out.negative.count += in.cols.n - (column >= 0) - (in.pairs.own(row) >= 0);
    if (column < 0) return;
    pair.to(out, coefficients);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) pair.add_gradient(g[i], x[i], y[i], coefficients);
  }

  MIO_DEVICE void project(Row& g, const Row& x, int row, bool there) const {
    const float back = in.rows.back[row] * in.gradient_times;
    float dot = 0;
    if (in.normalize) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) dot += dot_eight(g[i], x[i]);
      dot = sum_lanes<kRowLanes>(dot);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) g[i][j] = (g[i][j] - dot * x[i][j]) * back;
      if (there) store_row_eight(in.grad + int64_t(row) * in.d, feature(lane, i), in.d, aligned, g[i]);
    }
  }
};

// Shared memory after the sweep.
template <class T>
struct Totals {
  double scratch[T::kWarps * kSums];
  PairSums total;
  unsigned flag;
};

// Adds this block's sums to the records, finishes rows, and writes the results if it is the last block of all. The last
// block of some rows finishes these; where all blocks run at a time they wait for each other, and each finishes a
// share.
template <class A, class T, bool kIds>
MIO_DEVICE void end_sweep(const Sweep& in, double (&sums)[kSums]) {
  auto& shared = *reinterpret_cast<Totals<T>*>(shared_memory());
  const int row_block = fresh_block_index(), row0 = row_block * T::kBlockM;
  const int row_blocks = gridDim.x, blocks = in.splits * gridDim.z;
  const Coefficients coefficients(
      read_params(in.results.constants, in.results.params));  // made anew, for the same reason
  const RowProjection<A, T, kIds> projection{in, coefficients, TileTerms<A, 1, kIds>::acc_weight(coefficients)};
  auto record = [&](int part) {
    if (!in.loss) return;
    block_total<T::kWarps>(sums, shared.scratch, &shared.total);
    PairSums* to = in.records + int64_t(part) * row_blocks + row_block;
    if (threadIdx.x < kSums) fields(to)[threadIdx.x] = fields(&shared.total)[threadIdx.x];
  };
  int records = in.splits + 1;
  if (in.together) {
    records = blocks;
    if (in.grad) sync_grid();
    const int part = blockIdx.y + in.splits * blockIdx.z, share = ceil_div(T::kBlockM, blocks), first = part * share;
    const PairSums rest =
        projection.rows(row0 + first, row0 + (first + share < T::kBlockM ? first + share : T::kBlockM));
    add_to(sums, rest, blockIdx.z == 0);  // all slices have the same
    record(part);
  } else {
    if (blockIdx.z == 0) record(blockIdx.y);
    if (last_to_arrive(&in.tickets[1 + row_block], blocks, &shared.flag)) {
      add_to(sums, projection.rows(row0, row0 + T::kBlockM), false);
      record(in.splits);
    }
  }
  if (in.loss && last_to_arrive(in.tickets, row_blocks * blocks, &shared.flag))
    sum_records<T::kWarps>(in.records, row_blocks * records, in.results, shared.scratch, &shared.total);
}

}  // namespace mio_ext
