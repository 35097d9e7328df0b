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
  bool prepares;  // what is to be prepared is in `prepare`, and all blocks run at a time
  Prepared rows, cols;
  Pairs pairs;
  Results results;
  int d;
  bool normalize;
  bool loss;             // sum up the loss too; a second sweep, for dy, need not
  float gradient_times;  // 2 where y = x: G is symmetric, eq. (9)
  float* grad;           // [n, d] or nullptr
  float* partial;        // [splits, n, d] the gradient's parts; `grad` itself if there is one split
  int tiles_per_split, splits;
  PairSums* records;  // [splits + 1, row blocks]
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
template <class A, int kWarps>
MIO_DEVICE void prepare_together(const Prepare& in) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int warps = kWarps * gridDim.x * gridDim.y * gridDim.z;
  if (block == 0) clear_tickets(in);
  for (int side = 0; side < in.sides; ++side)
    for (int row = block * kWarps + threadIdx.x / 32; row < in.out[side].n_pad; row += warps)
      prepare_row<A>(in, side, row);
  sync_grid();
}

// ---------------------------------------------------------------- after the sweep

// The sums of the rows' gradient parts, their positive pairs, and eq. (10). Eight lanes to a row.
template <class A, class T, bool kIds>
struct Finish {
  using Element = typename A::Element;
  static constexpr int kLanes = 8, kEach = T::kWidth / kLanes;
  const Sweep& in;
  const Scales& scales;
  const float acc_weight;  // of what is in `partial`
  const int lane = threadIdx.x % kLanes;

  MIO_DEVICE void rows(int row0, double (&sums)[kSums]) const {
    PairSums out;
    // All lanes of a warp take part in its sums, whether they have a row or not.
    for (int r = threadIdx.x / kLanes; r < T::kBlockM; r += T::kThreads / kLanes) this->row(row0 + r, out);
    if (lane != 0) out = PairSums();
    to_array(out, sums);
  }

 private:
  MIO_DEVICE void row(int row, PairSums& out) const {
    const bool there = row < in.rows.n;
    float z[kEach], g[kEach];
    load(z, in.rows, row);
#pragma unroll
    for (int i = 0; i < kEach; ++i) g[i] = 0;
    if (in.grad && there) add_parts(g, row);
    if constexpr (!kIds) {
      positive_pair(g, z, there ? row : -1, out);
    }
    if (in.grad) project(g, z, row, there);
  }

  MIO_DEVICE void load(float (&z)[kEach], const Prepared& from, int row) const {
    const auto* at = reinterpret_cast<const Element*>(static_cast<const unsigned char*>(from.z) +
                                                      row_at(T::kTiled, row, T::kRowBytes));
#pragma unroll
    for (int i = 0; i < kEach; ++i) z[i] = get_feature<A>(at, feature_at(T::kTiled, row, lane + i * kLanes), T::kWidth);
  }

  MIO_DEVICE void add_parts(float (&g)[kEach], int row) const {
    for (int s = 0; s < in.splits; ++s) {
      const float* at = in.partial + (int64_t(s) * in.rows.n + row) * in.d + lane;
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (lane + i * kLanes < in.d) g[i] += load_fresh(at + i * kLanes);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) g[i] *= acc_weight;
  }

  // At most one a row, and what is left is negative. row < 0: none.
  MIO_DEVICE void positive_pair(float (&g)[kEach], const float (&z)[kEach], int row, PairSums& out) const {
    const int column = row < 0 ? -1 : in.pairs.positive(row);
    const bool there = column >= 0;
    float partner[kEach], product = 0;
    load(partner, in.cols, there ? column : 0);
#pragma unroll
    for (int i = 0; i < kEach; ++i) product += z[i] * partner[i];
    product = sum_lanes<kLanes>(product);
    if (row < 0) return;
    out.negative.count += in.cols.n - there - (in.pairs.own(row) >= 0);
    if (!there) return;
    const float weight = add_positive(out, product, in.rows, row, in.cols, column, scales);
#pragma unroll
    for (int i = 0; i < kEach; ++i) g[i] += weight * partner[i];
  }

  MIO_DEVICE void project(float (&g)[kEach], const float (&z)[kEach], int row, bool there) const {
    const float inverse = in.rows.inverse[row], back = in.rows.back[row] * in.gradient_times;
    if (in.normalize) {
      float dot = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) dot += g[i] * (z[i] * inverse);
      dot = sum_lanes<kLanes>(dot);
#pragma unroll
      for (int i = 0; i < kEach; ++i) g[i] -= dot * (z[i] * inverse);
    }
    float* at = in.grad + int64_t(row) * in.d + lane;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (there && lane + i * kLanes < in.d) at[i * kLanes] = g[i] * back;
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

// Adds this block's sums to the records, finishes its rows if it is their last block, and writes the results if it
// is the last of all.
template <class A, class T, bool kIds>
MIO_DEVICE void finish(const Sweep& in, double (&sums)[kSums], const Scales& scales, float acc_weight) {
  auto& shared = *reinterpret_cast<Totals<T>*>(shared_memory());
  const int row_blocks = gridDim.x;
  auto record = [&](int part) {
    if (!in.loss) return;
    block_total<T::kWarps>(sums, shared.scratch, &shared.total);
    PairSums* to = in.records + int64_t(part) * row_blocks + blockIdx.x;
    if (threadIdx.x < kSums) fields(to)[threadIdx.x] = fields(&shared.total)[threadIdx.x];
  };
  if (blockIdx.z == 0) record(blockIdx.y);  // all slices have the same
  const int blocks = in.splits * gridDim.z;
  if (last_to_arrive(&in.tickets[1 + blockIdx.x], blocks, &shared.flag)) {
    Finish<A, T, kIds>{in, scales, acc_weight}.rows(blockIdx.x * T::kBlockM, sums);
    record(in.splits);
  }
  if (in.loss && last_to_arrive(in.tickets, row_blocks * blocks, &shared.flag))
    sum_records<T::kWarps>(in.records, row_blocks * (in.splits + 1), in.results, shared.scratch, &shared.total);
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
  if (in.prepares) prepare_together<A, T::kWarps>(in.prepare);

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
  finish<A, T, kIds>(in, sums, scales, terms.acc_weight(scales));
}

}  // namespace mio_ext
