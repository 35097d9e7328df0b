// SPDX-License-Identifier: Apache-2.0
// The chunked path's logits for features of 16 bits: products, loss and G of a chunk of rows in one kernel, which
// writes G alone, in 16 bits, eq. (7)-(8). What G means is said in chunked.cuh; chunked_hopper.cuh does the same for
// compute capability 9.0.
//
// A block has a tile of 128 x 128 logits and a record. Its eight warps have 32 x 64 each, over 32 features at a time,
// which cp.async brings some stages ahead. Two blocks share a multiprocessor: one multiplies while the other is at its
// terms. Of these a warp does one row fragment after the other, for registers hold the sums of no more.
#pragma once

#include "chunked.cuh"
#include "products.cuh"

namespace mio_ext {

struct ChunkLogits {
  Prepared rows, cols;
  Pairs pairs;
  LossParams constants;
  const float* params;
  bool normalize;
  int width;          // features, padded
  int row0, n;        // the chunk
  void* g;            // [n up to a multiple of kChunkMultiple, cols.n_pad] in the features' type, or nullptr
  bool first;         // of the chunks: the records are written, not added to
  PairSums* records;  // [blocks]

  // Of PortableWideTile, rows first.
  MIO_DEVICE int first_row(int tile) const {
    return row0 + tile % ceil_div(n, PortableWideTile::kBlockM) * PortableWideTile::kBlockM;
  }
  MIO_DEVICE int first_column(int tile) const {
    return tile / ceil_div(n, PortableWideTile::kBlockM) * PortableWideTile::kBlockN;
  }
};

// G of N x 8 columns from `to` on, which is this thread's first row and column; s has sigma times the column's norm.
template <class A, int N>
MIO_DEVICE void store_g(typename A::Element* to, int64_t next_row, const float (&s)[N][4], const float (&inverse)[2]) {
  const typename A::Element type{};
#pragma unroll
  for (int n = 0; n < N; n += 4)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = pack(type, s[n + i][2 * h] * inverse[h], s[n + i][2 * h + 1] * inverse[h]);
      *reinterpret_cast<uint4*>(to + h * next_row + Gathered::column(n)) = {w[0], w[1], w[2], w[3]};
    }
}

// Rows and columns of 32 features, these to places that have them gathered in the accumulators.
struct WideCopies {
  using T = PortableWideTile;
  static constexpr int kRows = T::kThreads / (T::kRowBytes / 16);  // at a time
  const unsigned char *rows, *columns;
  const int64_t row_bytes;
  const uint32_t row_to = T::place(threadIdx.x / 4, threadIdx.x % 4),
                 column_to = T::place(gathered(threadIdx.x / 4), threadIdx.x % 4);

  MIO_DEVICE WideCopies(const ChunkLogits& in, int row0, int col0)
      : rows(first(in.rows, row0, in.width)), columns(first(in.cols, col0, in.width)), row_bytes(in.width * 2) {}

  MIO_DEVICE void start(uint32_t stage, int block) const {
#pragma unroll
    for (int i = 0; i < T::kBlockM / kRows; ++i) {
      const int64_t from = i * kRows * row_bytes + block * T::kRowBytes;
      cp_async(stage + row_to + i * kRows * T::kRowBytes, rows + from);
      cp_async(stage + T::kColumnsAt + column_to + i * kRows * T::kRowBytes, columns + from);
    }
  }

 private:
  MIO_DEVICE static const unsigned char* first(const Prepared& of, int row0, int width) {
    return static_cast<const unsigned char*>(of.z) + int64_t(row0 + threadIdx.x / 4) * (width * 2) +
           threadIdx.x % 4 * 16;
  }
};

MIO_DEVICE int warp_row(int warp) { return warp % 4 * PortableWideTile::kWarpM; }
MIO_DEVICE int warp_column(int warp) { return warp / 4 * PortableWideTile::kWarpN; }

// s += x y^T (2), but for the norms, of a warp's rows and columns and the features of a stage.
template <class A, int F, int N>
MIO_DEVICE void add_logits(float (&s)[F][N][4], uint32_t stage) {
  using T = PortableWideTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t rows = T::place(warp_row(warp) + lane % 16, lane / 16);
  const uint32_t columns = T::place(warp_column(warp) + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int step = 0; step < T::kFeatures / 16; ++step) {
    uint32_t a[F][1][4];
#pragma unroll
    for (int f = 0; f < F; ++f) ldmatrix(a[f][0], stage + (rows ^ step << 5) + f * 16 * T::kRowBytes);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[1][4];
      ldmatrix(b[0], stage + T::kColumnsAt + (columns ^ step << 5) + n * 8 * T::kRowBytes);
#pragma unroll
      for (int f = 0; f < F; ++f)
#pragma unroll
        for (int j = 0; j < 2; ++j) multiply<A>(s[f][n + j], a[f], b, 2 * j);
    }
  }
}

// Loss, statistics and G of a warp's row fragment f, whose sums are added to `sums`, and the others' after. What it
// needs of indices and coefficients is made anew: registers have no room for it beside the products.
template <class A, bool kIds, int f, int F, int N>
MIO_DEVICE void fragment_terms(const ChunkLogits& in, float (&s)[F][N][4], uint32_t factors, double (&sums)[kSums]) {
  using T = PortableWideTile;
  const int warp = fresh_thread_index() / 32, lane = fresh_thread_index() % 32;
  const int warp_row0 = in.first_row(fresh_block_index()) + warp_row(warp);
  const int col0 = in.first_column(fresh_block_index()) + warp_column(warp);
  const int row0 = warp_row0 + 16 * f + lane / 4;  // this thread's first
  const bool crossed = col0 + T::kWarpN > in.cols.n || is_cut(warp_row0, T::kWarpM, in.rows.n) ||
                       in.pairs.crossings(warp_row0, T::kWarpM, T::kWarpN).at(col0);
  const Coefficients coefficients(read_params(in.constants, in.params));
  TileTerms<A, 1, kIds, GatheredColumns> terms(in.rows, in.cols, in.pairs, row0, coefficients, in.normalize, true);
  auto& of = reinterpret_cast<float (&)[1][N][4]>(s[f]);
  const uint32_t at = factors + warp_column(warp) * 4;
  terms.template tile<0>(of, [] {}, at, at + T::kKeysAt - T::kFactorsAt, col0, crossed);
  if (in.g) {
    const float inverse[2] = {in.rows.inverse[row0], in.rows.inverse[row0 + GatheredColumns::kNextRow]};
    auto* to = static_cast<typename A::Element*>(in.g) + int64_t(row0 - in.row0) * in.cols.n_pad + col0 +
               lane % 4 * GatheredColumns::kLaneColumns;
    store_g<A, N>(to, int64_t(GatheredColumns::kNextRow) * in.cols.n_pad, of[0], inverse);
  }
  if constexpr (f + 1 < F) {
    fragment_terms<A, kIds, f + 1>(in, s, factors, sums);
  }
  double more[kSums];
  terms.total(more);
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] += more[i];
}

// Grid: [tiles of the chunk].
template <class A, bool kIds>
__global__ void __launch_bounds__(PortableWideTile::kThreads, 2) chunk_logits_kernel(const ChunkLogits in) {
  using T = PortableWideTile;
  constexpr int F = T::kWarpM / 16, N = T::kWarpN / 8;
  const uint32_t smem = shared_address(shared_memory());
  const int tile_row0 = in.first_row(blockIdx.x), tile_col0 = in.first_column(blockIdx.x);
  const int blocks = in.width / T::kFeatures;
  const WideCopies copies(in, tile_row0, tile_col0);
  if (threadIdx.x < T::kBlockN / 4) {
    cp_async(smem + T::kFactorsAt + threadIdx.x * 16, in.cols.inverse + tile_col0 + threadIdx.x * 4);
    if (in.cols.ids) cp_async(smem + T::kKeysAt + threadIdx.x * 16, in.cols.keys + tile_col0 + threadIdx.x * 4);
  }
#pragma unroll
  for (int block = 0; block < T::kStages - 1; ++block) {
    copies.start(smem + block * T::kStageBytes, block);
    cp_async_commit();
  }
  float s[F][N][4] = {};
  uint32_t stage = smem, free_stage = smem + (T::kStages - 1) * T::kStageBytes;
  auto next = [&](uint32_t at) { return at == smem + (T::kStages - 1) * T::kStageBytes ? smem : at + T::kStageBytes; };
  for (int block = 0; block < blocks; ++block, stage = next(stage), free_stage = next(free_stage)) {
    cp_async_wait<T::kStages - 2>();
    __syncthreads();  // the block is there for all, and its predecessor's place is free
    if (block + T::kStages - 1 < blocks) copies.start(free_stage, block + T::kStages - 1);
    cp_async_commit();
    add_logits<A>(s, stage);
  }

  double sums[kSums] = {};
  fragment_terms<A, kIds, 0>(in, s, smem + T::kFactorsAt, sums);
  __syncthreads();  // shared memory changes its use
  write_record<T::kWarps>(sums, in.records + fresh_block_index(), !in.first);
}

}  // namespace mio_ext
