// SPDX-License-Identifier: Apache-2.0
// All pairs of a block of rows: logits, loss, and the rows' gradient, in one sweep over the columns.
//
// A block of four warps owns kBlockM rows and walks over tiles of kBlockN columns, which cp.async brings into
// shared memory some tiles ahead. A warp makes the tile's logits for its 16 or 32 rows on the tensor cores,
// turns them into sigmoids where they lie in registers, and multiplies those, as the left operand of the second
// product, with the same tile: only the rows' gradient, in float32 registers, lives through the loop. Labels are
// a matter of the few tiles that a diagonal crosses. A row's one positive pair has a weight N times that of a
// negative one, and is done after the loop in float32 (project.cuh). Nothing of size M x K exists anywhere.
#pragma once

#include <type_traits>

#include "products.cuh"
#include "project.cuh"

namespace mio_ext {

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
  if (threadIdx.x < T::kBlockN / 4) {
    cp_async(stage + T::kFactorsAt + threadIdx.x * 16, cols.inverse + col0 + threadIdx.x * 4);
    if (cols.ids) cp_async(stage + T::kKeysAt + threadIdx.x * 16, cols.keys + col0 + threadIdx.x * 4);
  }
}

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

// Grid: [row blocks, splits, slices of the features].
template <class A, int kWidth, bool kIds>
__global__ void __launch_bounds__(Tile<A, kWidth>::kThreads, Tile<A, kWidth>::kBlocksPerMultiprocessor)
    sweep_kernel(const Sweep in) {
  using T = Tile<A, kWidth>;
  constexpr int F = T::kRowFragments, N = T::kBlockN / 8;
  const int block_row0 = blockIdx.x * T::kBlockM, warp_row = threadIdx.x / 32 * 16 * F;
  const int row0 = block_row0 + warp_row + threadIdx.x % 32 / 4;  // this thread's first
  const uint32_t smem = shared_address(shared_memory());
  const uint32_t first_stage = smem + T::kColumnsAt, last_stage = first_stage + (T::kStages - 1) * T::kStageBytes;
  const Coefficients coefficients(read_params(in.results.constants, in.results.params));
  if (in.prepares) prepare_together<A, T::kThreads>(in.prepare);

  const int tiles = ceil_div(in.cols.n, T::kBlockN), first = blockIdx.y * in.tiles_per_split;
  const int end = first + in.tiles_per_split < tiles ? first + in.tiles_per_split : tiles;
  copy_rows<T, T::kBlockM>(smem, in.rows.z, block_row0);
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) {
    if (first + i < end) copy_columns<T>(first_stage + i * T::kStageBytes, in.cols, (first + i) * T::kBlockN);
    cp_async_commit();
  }

  TileTerms<A, F, kIds> terms(in.rows, in.cols, in.pairs, row0, coefficients, in.normalize, in.loss);
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
    const bool crossed = col0 + T::kBlockN > in.cols.n || is_cut(block_row0 + warp_row, 16 * F, in.rows.n) ||
                         in.pairs.crossings(block_row0, T::kBlockM, T::kBlockN).at(col0);
    terms.template tile<0>(s, [] {}, stage + T::kFactorsAt, stage + T::kKeysAt, col0, crossed);
    if (in.grad) gradient<A, T>(acc, s, T::kSlices == 1 ? stage : stage + slice_at);
    stage = stage == last_stage ? first_stage : stage + T::kStageBytes;
  }
  if (in.grad) store_part<T>(in, acc, row0, blockIdx.y);
  __syncthreads();  // shared memory changes its use
  double sums[kSums];
  terms.total(sums);
  end_sweep<A, T, kIds>(in, sums);
}

}  // namespace mio_ext
