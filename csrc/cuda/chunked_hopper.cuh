// SPDX-License-Identifier: Apache-2.0
// The chunked path's logits for compute capability 9.0, features of 16 bits: products, loss and G of a chunk of rows in
// one kernel, which writes G alone, in 16 bits, eq. (7)-(8). What G means is said in chunked.cuh.
//
// Blocks stay for all of the chunk. A cluster of two takes pairs of tiles of 128 x 256 logits, one below the other,
// each so many pairs after the last as there are clusters; columns slowest, so that the chunk's rows stay in the L2
// cache and the columns pass through it once. A producer copies its rows and half of the columns, 64 features at a
// time, into stages that mbarriers guard, the columns into both blocks'. Two consumers of four warps, with 64 rows
// each, add up their products in registers, and the producer goes on copying while they are at the terms. The second
// consumer begins kStages blocks of features after the first and stays behind: so one has the tensor cores while the
// other is at its terms.
#pragma once

#include "chunked_logits.cuh"
#include "sweep_hopper.cuh"

namespace mio_ext {

// A cluster's pairs of tiles, and of these the one of the block's place in it.
struct TilePairs {
  const ChunkLogits& in;

  MIO_DEVICE int row_pairs() const { return ceil_div(in.n, WideTile::kClusterRows); }
  MIO_DEVICE int count() const { return row_pairs() * (in.cols.n_pad / WideTile::kBlockN); }
  MIO_DEVICE int first_row(int pair) const {
    return in.row0 + pair % row_pairs() * WideTile::kClusterRows + cluster_rank() * WideTile::kBlockM;
  }
  MIO_DEVICE int first_column(int pair) const { return pair / row_pairs() * WideTile::kBlockN; }

  MIO_DEVICE static int cluster_rank() { return blockIdx.x % WideTile::kCluster; }
  MIO_DEVICE static int first() { return blockIdx.x / WideTile::kCluster; }
  MIO_DEVICE static int clusters() { return gridDim.x / WideTile::kCluster; }
};
static_assert(WideTile::kClusterRows == kChunkMultiple && WideTile::kBlockN == WideTile::kCluster * kRowMultiple);

// A stage is free once the consumers of both blocks have read it, for both producers write to both. What the other
// writes may come before this one has announced it; the phase does not end before that.
//
// A tile's factors, and keys, come with its first block of features. The slot is free then: the stage of that block was
// free, and had a block of the tile before, of which there are at least kStages. Who has read that is done with the
// tile before.
MIO_DEVICE void produce_chunk(const ChunkLogits& in, uint32_t smem) {
  using T = WideTile;
  const TilePairs pairs{in};
  const int row_bytes = in.width * 2, blocks = in.width / kBlockFeatures, rank = pairs.cluster_rank();
  PipelineState<T> state{smem};
  const uint32_t tile_bytes = in.cols.ids ? 2 * T::kFactorBytes : T::kFactorBytes;
  uint32_t factors = smem + T::kFactorsAt, other_factors = factors + T::kFactorBytes;
  for (int pair = pairs.first(); pair < pairs.count(); pair += pairs.clusters()) {
    const int col0 = pairs.first_column(pair);
    const auto* rows = static_cast<const unsigned char*>(in.rows.z) + int64_t(pairs.first_row(pair)) * row_bytes;
    const auto* columns =
        static_cast<const unsigned char*>(in.cols.z) + int64_t(col0 + rank * kRowMultiple) * row_bytes;
    for (int block = 0; block < blocks; ++block, state.next()) {
      mbarrier_wait(state.empty(), state.parity ^ 1);
      mbarrier_arrive_expecting(state.full(), T::kStageBytes + (block == 0 ? tile_bytes : 0));
      bulk_copy(state.columns() - T::kColumnsAt, rows + int64_t(block) * T::kGroupBytes, T::kGroupBytes, state.full());
      bulk_copy_to((1 << T::kCluster) - 1, state.columns() + rank * T::kGroupBytes,
                   columns + int64_t(block) * T::kGroupBytes, T::kGroupBytes, state.full());
      if (block > 0) continue;
      bulk_copy(factors, in.cols.inverse + col0, T::kFactorBytes, state.full());
      if (in.cols.ids)
        bulk_copy(factors + T::kKeysAt - T::kFactorsAt, in.cols.keys + col0, T::kFactorBytes, state.full());
    }
    const uint32_t used = factors;
    factors = other_factors, other_factors = used;
  }
}

constexpr int kHeadStart = 1;  // the named barrier at which the second consumer waits for its first tile

// s = x y^T (2), but for the norms, of a consumer's rows and a tile of columns; a block's stage is free once the next
// one's products are under way and its own are done.
template <class A>
MIO_DEVICE void wide_logits(float (&s)[WideTile::kBlockN / 8][4], PipelineState<WideTile>& state, int blocks,
                            int consumer, bool first) {
  using T = WideTile;
  PipelineState<T> last = state;
  auto release = [&] {  // in both blocks
    if (threadIdx.x % 32 < T::kCluster) mbarrier_arrive_at(last.empty(), threadIdx.x % 32);
  };
  for (int block = 0; block < blocks; ++block, state.next()) {
    mbarrier_wait(state.full(), state.parity);
    const Descriptor rows(state.columns() - T::kColumnsAt + consumer * T::kConsumerRows * kBlockRowBytes),
        columns(state.columns());
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockFeatures / 16; ++step)
      wgmma(typename A::Element{}, s, rows + step * 32, columns + step * 32, block + step > 0);
    wgmma_commit();
    if (block > 0) {
      wgmma_wait<1>();
      release();
    }
    if (first && consumer == 0 && block == T::kStages - 1) barrier_arrive(kHeadStart, T::kThreads);
    last = state;
  }
  wgmma_wait<0>();
  hold_all(s);
  release();
}

// Loss, statistics and G of a consumer's logits. Terms take half of the columns at a time: they multiply 64 factors
// 1 + e at most.
template <class A, bool kIds>
MIO_DEVICE void wide_terms(const ChunkLogits& in, const Coefficients& coefficients,
                           float (&s)[1][WideTile::kBlockN / 8][4], uint32_t factors, int pair, int consumer,
                           double (&sums)[kSums]) {
  using T = WideTile;
  constexpr int kHalf = T::kBlockN / 2, N = kHalf / 8;
  const int lane = threadIdx.x % 32, tile_row0 = TilePairs{in}.first_row(pair),
            tile_col0 = TilePairs{in}.first_column(pair);
  const int consumer_row0 = tile_row0 + consumer * T::kConsumerRows;
  const int row0 = tile_row0 + gathered(threadIdx.x / 32 * 16 + lane / 4);  // this thread's first
  TileTerms<A, 1, kIds, Gathered> terms(in.rows, in.cols, in.pairs, row0, coefficients, in.normalize, true);
  const float inverse[2] = {in.rows.inverse[row0], in.rows.inverse[row0 + Gathered::kNextRow]};
  auto* to = static_cast<typename A::Element*>(in.g) + int64_t(row0 - in.row0) * in.cols.n_pad + tile_col0 +
             lane % 4 * Gathered::kLaneColumns;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    auto& of = reinterpret_cast<float (&)[1][N][4]>(s[0][half * N]);
    const int col0 = tile_col0 + half * kHalf;
    const bool crossed = col0 + kHalf > in.cols.n || is_cut(consumer_row0, T::kConsumerRows, in.rows.n) ||
                         in.pairs.crossings(consumer_row0, T::kConsumerRows, kHalf).at(col0);
    const uint32_t at = factors + half * kHalf * 4;
    terms.template tile<0>(of, [] {}, at, at + T::kKeysAt - T::kFactorsAt, col0, crossed);
    if (in.g) store_g<A, N>(to + half * kHalf, int64_t(Gathered::kNextRow) * in.cols.n_pad, of[0], inverse);
  }
  double more[kSums];
  terms.total(more);
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] += more[i];
}

// Grid: [as many as there are multiprocessors], in clusters.
template <class A, bool kIds>
__global__ void __launch_bounds__(WideTile::kThreads + WideTile::kProducerThreads, 1)
    chunk_hopper_kernel(const ChunkLogits in) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  trap();  // such code is never chosen: hopper_is_built() is false
#else
  using T = WideTile;
  const uint32_t smem = shared_address(shared_memory());
  if (threadIdx.x == 0) {
    if (smem % 1024 != 0 || in.width < T::kStages * kBlockFeatures) trap();
    PipelineState<T> state{smem};
    for (int i = 0; i < T::kStages; ++i, state.next())
      mbarrier_init(state.full(), 1), mbarrier_init(state.empty(), T::kCluster * T::kWarps);
    mbarrier_init_fence();
  }
  sync_cluster();
  if (threadIdx.x >= T::kThreads) {
    fewer_registers<T::kProducerRegisters>();
    if (threadIdx.x == T::kThreads) produce_chunk(in, smem);
    return;
  }
  more_registers<T::kConsumerRegisters>();

  const TilePairs pairs{in};
  const int consumer = threadIdx.x / 128, first = pairs.first();
  const Coefficients coefficients(read_params(in.constants, in.params));
  double sums[kSums] = {};
  PipelineState<T> state{smem};
  uint32_t factors = smem + T::kFactorsAt, other_factors = factors + T::kFactorBytes;
  if (consumer == 1 && first < pairs.count()) barrier_wait(kHeadStart, T::kThreads);
  for (int pair = first; pair < pairs.count(); pair += pairs.clusters()) {
    float s[1][T::kBlockN / 8][4];
    wide_logits<A>(s[0], state, in.width / kBlockFeatures, consumer, pair == first);
    wide_terms<A, kIds>(in, coefficients, s, factors, pair, consumer, sums);
    const uint32_t used = factors;
    factors = other_factors, other_factors = used;
  }
  sync_cluster();  // of the consumers: the producers have left. The other block arrives here no more, and shared memory
                   // changes its use
  write_record<T::kWarps>(sums, in.records + blockIdx.x, !in.first);
#endif
}

}  // namespace mio_ext
