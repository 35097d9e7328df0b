// SPDX-License-Identifier: Apache-2.0
// The end of a sweep: the parts of the rows' gradient come together, their positive pairs are added in float32, and the
// gradient is projected through the norm, eq. (10).
#pragma once

#include <type_traits>

#include "labelled.cuh"
#include "prepare.cuh"

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
  float* totals;      // [2, row blocks, width] of unit vectors, rows' and columns', where the loop has no products
  unsigned* tickets;  // [1 + row blocks], zero
};

// The sums of the rows' gradient parts, their positive pairs, and eq. (10). kRowLanes lanes to a row, eight features
// at a time. Where the sweep leaves out products, their sums are made here: of sigma . product from the gradient, for
// x^ . sum sigma y^ is that, and of products from the sums of all unit vectors, less the pairs that are no negative
// ones.
template <class A, class T, bool kIds>
struct RowProjection {
  static constexpr bool kProducts = !kIds && !T::kProductsInLoop;
  static constexpr int kGroups = T::kWidth / (8 * kRowLanes), kAtATime = T::kThreads / kRowLanes;
  using Row = float[kGroups][8];
  const Sweep& in;
  const Coefficients& coefficients;
  const float acc_weight;  // of what is in `partial`
  const int thread = fresh_thread_index(), lane = thread % kRowLanes;
  const bool aligned = rows_are_aligned(in.grad, in.d) && rows_are_aligned(in.partial, in.d);

  // Rows row0 to end - 1, which may not all exist. All lanes of a warp take part in its sums, whether they have a row
  // or not.
  MIO_DEVICE PairSums rows(int row0, int end, float* scratch) const {
    PairSums out;
    Row total = {};
    for (int first = row0; first < end; first += kAtATime) {
      const int row = first + thread / kRowLanes;
      const bool there = row < end && row < in.rows.n;
      this->row(there ? row : row0, there, total, out);
    }
    if constexpr (kProducts) {
      if (in.loss) write_totals(total, scratch);
    }
    return lane == 0 ? out : PairSums();
  }

 private:
  MIO_DEVICE static int feature(int lane, int group) { return 8 * (lane + group * kRowLanes); }

  MIO_DEVICE static float dot(const Row& a, const Row& b) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) sum += dot_eight(a[i], b[i]);
    return sum_lanes<kRowLanes>(sum);
  }
  MIO_DEVICE static void scale(Row& a, float times) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) a[i][j] *= times;
  }
  MIO_DEVICE static void add(Row& a, const Row& b) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) a[i][j] += b[i][j];
  }

  MIO_DEVICE void row(int row, bool there, Row& total, PairSums& out) const {
    Row x, g = {};
    load(x, in.rows, in.side, row);
    if (in.grad && there) add_parts(g, row);
    if constexpr (kProducts) {
      if (in.loss) {
        const float sigmoid_product = dot(g, x);
        const int own = in.pairs.own(row);
        Row y;
        load(y, in.cols, column_side(), own < 0 ? 0 : own);
        const float own_product = dot(x, y);
        if (there) {
          add(total, x);
          out.negative.sigmoid_prod += double(sigmoid_product) / A::kLift;
          if (own >= 0) out.negative.product -= own_product;
        }
      }
    }
    scale(g, acc_weight);
    if (there) out.negative.count += in.cols.n - (in.pairs.own(row) >= 0);
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
  }
  template <bool kAligned>
  MIO_DEVICE void add_parts_as(Row& g, int row) const {
    const float* at = in.partial + int64_t(row) * in.d;
#pragma unroll(kAligned ? 4 : 1)
    for (int s = 0; s < in.splits; ++s, at += int64_t(in.rows.n) * in.d)
#pragma unroll
      for (int i = 0; i < kGroups; ++i) add_row_eight<kAligned>(g[i], at, feature(lane, i), in.d);
  }

  MIO_DEVICE int column_side() const { return in.prepare.sides == 2 ? 1 - in.side : 0; }

  // Of this row block's unit vectors, and of its share of the columns'.
  MIO_DEVICE void write_totals(const Row& total, float* scratch) const {
    const int block = fresh_block_index(), row_blocks = gridDim.x;
    float* to = in.totals + int64_t(block) * T::kWidth;
    block_row(total, scratch, to);
    if (in.cols.z == in.rows.z) return;
    const int share = ceil_div(in.cols.n, row_blocks), first = block * share;
    const int end = in.cols.n - first < share ? in.cols.n : first + share;
    Row of_columns = {};
    for (int column = first + thread / kRowLanes; column < end; column += kAtATime) {
      Row y;
      load(y, in.cols, column_side(), column);
      add(of_columns, y);
    }
    block_row(of_columns, scratch, to + int64_t(row_blocks) * T::kWidth);
  }
  // Adds up a row's worth of all threads, in one order, and writes it. scratch: [warps, width], shared memory.
  MIO_DEVICE void block_row(const Row& row, float* scratch, float* to) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float v = row[i][j];
        v += shuffle_xor(v, 8);
        v += shuffle_xor(v, 16);
        if (thread % 32 < kRowLanes) scratch[thread / 32 * T::kWidth + feature(lane, i) + j] = v;
      }
    __syncthreads();
    if (thread < T::kWidth) {
      float v = 0;
      for (int w = 0; w < T::kWarps; ++w) v += scratch[w * T::kWidth + thread];
      to[thread] = v;
    }
    __syncthreads();
  }

  // At most one a row, and what is left is negative.
  MIO_DEVICE void positive_pair(Row& g, const Row& x, int row, bool there, PairSums& out) const {
    const int column = in.pairs.positive(row);
    Row y;
    load(y, in.cols, column_side(), column < 0 ? 0 : column);
    PositivePair pair;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) pair.add(x[i], y[i]);
    pair.sum_up<kRowLanes>();
    if (!there) return;
    if (column < 0) return;
    out.negative.count -= 1;
    pair.to(out, coefficients);
    if constexpr (kProducts) {
      out.negative.product -= pair.product;
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) pair.add_gradient(g[i], x[i], y[i], coefficients);
  }

  MIO_DEVICE void project(Row& g, const Row& x, int row, bool there) const {
    const float back = in.rows.back[row] * in.gradient_times;
    const float along = in.normalize ? dot(g, x) : 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) g[i][j] = (g[i][j] - along * x[i][j]) * back;
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
  double features[T::kProductsInLoop ? 1 : T::kThreads * 4];
};

// A thread's part of the sum of all products, x^ . y^ of every row and column: some features' of the unit vectors'
// sums.
template <class T>
MIO_DEVICE double all_products(const Sweep& in, double* scratch) {
  constexpr int kFours = T::kWidth / 4, kAtATime = T::kThreads / kFours;  // row blocks
  const int thread = fresh_thread_index(), row_blocks = gridDim.x;
  double total[2] = {};
#pragma unroll
  for (int side = 0; side < (in.cols.z == in.rows.z ? 1 : 2); ++side) {
    const float* from = in.totals + int64_t(side) * row_blocks * T::kWidth + thread % kFours * 4;
    double four[4] = {};
#pragma unroll 8
    for (int block = thread / kFours; block < row_blocks; block += kAtATime) {
      const float4 v = load_fresh(reinterpret_cast<const float4*>(from + int64_t(block) * T::kWidth));
      four[0] += v.x, four[1] += v.y, four[2] += v.z, four[3] += v.w;
    }
    for (int i = 0; i < 4; ++i) scratch[thread * 4 + i] = four[i];
    __syncthreads();
    if (thread < T::kWidth)
      for (int i = 0; i < kAtATime; ++i) total[side] += scratch[i * T::kWidth + thread];
    __syncthreads();
  }
  return total[0] * (in.cols.z == in.rows.z ? total[0] : total[1]);
}

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
        projection.rows(row0 + first, row0 + (first + share < T::kBlockM ? first + share : T::kBlockM),
                        reinterpret_cast<float*>(shared.features));
    add_to(sums, rest, blockIdx.z == 0);  // all slices have the same
    record(part);
  } else {
    if (blockIdx.z == 0) record(blockIdx.y);
    if (last_to_arrive(&in.tickets[1 + row_block], blocks, &shared.flag)) {
      add_to(sums, projection.rows(row0, row0 + T::kBlockM, reinterpret_cast<float*>(shared.features)), false);
      record(in.splits);
    }
  }
  if (!in.loss || !last_to_arrive(in.tickets, row_blocks * blocks, &shared.flag)) return;
  PairSums more;
  if constexpr (RowProjection<A, T, kIds>::kProducts) more.negative.product = all_products<T>(in, shared.features);
  sum_records<T::kWarps>(in.records, row_blocks * records, in.results, shared.scratch, &shared.total, more);
}

}  // namespace mio_ext
