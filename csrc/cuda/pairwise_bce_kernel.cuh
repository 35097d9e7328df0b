// SPDX-License-Identifier: Apache-2.0
// All pairs of a block of rows: logits, loss, and the rows' gradient, in one sweep over the columns.
//
// A block of four warps owns kBlockM rows and walks over tiles of kBlockN columns, which cp.async brings into
// shared memory some tiles ahead. A warp makes the tile's logits for its 16 or 32 rows on the tensor cores,
// turns them into sigmoids where they lie in registers, and multiplies those, as the left operand of the second
// product, with the same tile: only the rows' gradient, in float32 registers, lives through the loop. Labels are
// a matter of the few tiles that a diagonal crosses. A row's one positive pair has a weight N times that of a
// negative one, and is done after the loop in float32 (finish_rows). Nothing of size M x K exists anywhere.
//
// Float sums are never added atomically: the block that comes last, known by a ticket, adds up what the others
// wrote, in one order.
#pragma once

#include <type_traits>

#include "pairwise_bce_products.cuh"
#include "pairwise_bce_terms.cuh"

namespace mio_ext {

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

// ---------------------------------------------------------------- shared memory

// Brings `rows` rows of `row_bytes` bytes of z, from row0 on, to shared memory.
template <class T, int kRows>
MIO_DEVICE void copy_rows(uint32_t to, const void* z, int row0) {
  constexpr int kChunks = T::kRowBytes / 16, kAtATime = T::kThreads / kChunks;  // rows, a power of two
  static_assert(kRows % kAtATime == 0, "every thread takes as many chunks");
  const unsigned char* from = static_cast<const unsigned char*>(z) + int64_t(row0) * T::kRowBytes + threadIdx.x * 16;
  const uint32_t place = to + swizzled(threadIdx.x / kChunks, threadIdx.x % kChunks, T::kRowBytes);
#pragma unroll
  for (int row = 0; row < kRows; row += kAtATime)  // as swizzled() has it: a thread's rows agree in the bits below
    cp_async((place ^ (row & 7) << 4) + row * T::kRowBytes, from + row * T::kRowBytes);
}

template <class T>
MIO_DEVICE void copy_columns(uint32_t stage, const Prepared& cols, int col0) {
  copy_rows<T, T::kBlockN>(stage, cols.z, col0);
  if (threadIdx.x < T::kBlockN / 4)
    cp_async(stage + T::kFactorsAt + threadIdx.x * 16, cols.inverse + col0 + threadIdx.x * 4);
}

// ---------------------------------------------------------------- before the sweep

// prepare_kernel's work, by the blocks of a cooperative launch.
template <class A, int kThreads>
MIO_DEVICE void prepare_together(const Prepare& in) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int rows = kThreads / kRowLanes * gridDim.x * gridDim.y * gridDim.z;  // at a time
  if (block == 0) clear_tickets(in);
  for (int side = 0; side < in.sides; ++side)
    for (int row = (block * kThreads + threadIdx.x) / kRowLanes; row < in.out[side].n_pad; row += rows)
      prepare_row<A, kRowLanes>(in, side, row);
  sync_grid();
}

// ---------------------------------------------------------------- after the sweep

// The sums of the rows' gradient parts, their positive pairs, and eq. (10). kRowLanes lanes to a row, eight features
// at a time.
template <class A, class T, bool kIds>
struct Finish {
  static constexpr int kGroups = T::kWidth / (8 * kRowLanes), kAtATime = T::kThreads / kRowLanes;
  using Row = float[kGroups][8];
  const Sweep& in;
  const Scales& scales;
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
      for (int i = 0; i < kGroups; ++i) unit_eight<A>(x[i], from, T::kTiled, row, T::kWidth, feature(lane, i), inverse);
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
    pair.to(out, scales);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) pair.add_gradient(g[i], x[i], y[i], scales);
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

// ---------------------------------------------------------------- the kernel

// This block's share of the gradient, as the accumulator's fragments lie.
template <class T, int F>
MIO_DEVICE void store_part(const Sweep& in, const float (&acc)[F][T::kSlice / 8][4], int row0, int split) {
  const int column = blockIdx.z * T::kSlice + threadIdx.x % 4 * 2;
#pragma unroll
  for (int f = 0; f < F; ++f)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + 16 * f + i / 2 * 8;
      if (row >= in.rows.n) continue;
      float* at = in.partial + (int64_t(split) * in.rows.n + row) * in.d;
#pragma unroll
      for (int n = 0; n < T::kSlice / 8; ++n) {
        const int feature = 8 * n + column + i % 2;
        if (feature < in.d) at[feature] = acc[f][n][i];
      }
    }
}

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
template <class A, class T, bool kIds, class Terms>
MIO_DEVICE void finish(const Sweep& in, double (&sums)[kSums]) {
  auto& shared = *reinterpret_cast<Totals<T>*>(shared_memory());
  const int row_block = fresh_block_index(), row0 = row_block * T::kBlockM;
  const int row_blocks = gridDim.x, blocks = in.splits * gridDim.z;
  const Scales scales(read_params(in.results.constants, in.results.params));  // made anew, for the same reason
  const Finish<A, T, kIds> finish{in, scales, Terms::acc_weight(scales)};
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
    const PairSums rest = finish.rows(row0 + first, row0 + (first + share < T::kBlockM ? first + share : T::kBlockM));
    add_to(sums, rest, blockIdx.z == 0);  // all slices have the same
    record(part);
  } else {
    if (blockIdx.z == 0) record(blockIdx.y);
    if (last_to_arrive(&in.tickets[1 + row_block], blocks, &shared.flag)) {
      add_to(sums, finish.rows(row0, row0 + T::kBlockM), false);
      record(in.splits);
    }
  }
  if (in.loss && last_to_arrive(in.tickets, row_blocks * blocks, &shared.flag))
    sum_records<T::kWarps>(in.records, row_blocks * records, in.results, shared.scratch, &shared.total);
}

// Grid: [row blocks, splits, slices of the features].
template <class A, int kWidth, bool kIds>
__global__ void __launch_bounds__(Tile<A, kWidth>::kThreads, Tile<A, kWidth>::kBlocksPerMultiprocessor)
    sweep_kernel(const Sweep in) {
  using T = Tile<A, kWidth>;
  constexpr int F = T::kRowFragments, N = T::kBlockN / 8;
  using Terms = std::conditional_t<kIds, LabelledTerms<A, F>, NegativeTerms<A, F>>;
  const int block_row0 = blockIdx.x * T::kBlockM, warp_row = threadIdx.x / 32 * 16 * F;
  const int row0 = block_row0 + warp_row + threadIdx.x % 32 / 4;  // this thread's first
  const uint32_t smem = shared_address(shared_memory());
  const uint32_t first_stage = smem + T::kColumnsAt, last_stage = first_stage + (T::kStages - 1) * T::kStageBytes;
  const Scales scales(read_params(in.results.constants, in.results.params));
  if (in.prepares) prepare_together<A, T::kThreads>(in.prepare);

  const int tiles = ceil_div(in.cols.n, T::kBlockN), first = blockIdx.y * in.tiles_per_split;
  const int end = first + in.tiles_per_split < tiles ? first + in.tiles_per_split : tiles;
  copy_rows<T, T::kBlockM>(smem, in.rows.z, block_row0);
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) {
    if (first + i < end) copy_columns<T>(first_stage + i * T::kStageBytes, in.cols, (first + i) * T::kBlockN);
    cp_async_commit();
  }

  Terms terms(in.rows, in.cols, row0, scales, in.normalize);
  float acc[F][T::kSlice / 8][4] = {};
  const uint32_t slice_at = blockIdx.z * (T::kSlice * T::kPartBytes / T::kWidth);  // a multiple of 128 bytes
  uint32_t stage = first_stage;
  for (int tile = first; tile < end; ++tile) {
    cp_async_wait<T::kStages - 2>();
    __syncthreads();  // the tile is there for all, and its predecessor's place is free
    const int ahead = tile + T::kStages - 1, col0 = tile * T::kBlockN;
    if (ahead < end)
      copy_columns<T>(stage == first_stage ? last_stage : stage - T::kStageBytes, in.cols, ahead * T::kBlockN);
    cp_async_commit();

    float s[F][N][4];
    logits<A, T>(s, smem + warp_row * T::kRowBytes, stage);
    const bool crossed = col0 + T::kBlockN > in.cols.n || in.pairs.cross(block_row0, T::kBlockM, col0, T::kBlockN);
    terms.tile(s, stage + T::kFactorsAt, in.pairs, row0, col0, crossed, in.loss);
    if (in.grad) gradient<A, T>(acc, s, T::kSlices == 1 ? stage : stage + slice_at);
    stage = stage == last_stage ? first_stage : stage + T::kStageBytes;
  }
  if (in.grad) store_part<T>(in, acc, row0, blockIdx.y);
  __syncthreads();  // shared memory changes its use
  double sums[kSums];
  terms.total(sums);
  finish<A, T, kIds, Terms>(in, sums);
}

}  // namespace mio_ext
