// SPDX-License-Identifier: Apache-2.0
// The sweep of sweep.cuh for compute capability 9.0: the same sums of the same pairs, but the matrix products are four
// warps' at a time and run beside everything else.
//
// A block is a producer, which copies column tiles into stages that mbarriers guard, and two consumers of four warps,
// each with 64 rows. A consumer makes a tile's logits from shared memory, turns them into G in registers, and
// multiplies that with the same tile. This last product is started behind the next tile's logits and runs while the
// consumer is at their sigmoids. The two consumers play ping-pong, starting their products in turn, so the other's run
// then too.
//
// prepare_row() lays rows out as the products read them, so a tile is one stretch of memory for each 64 features.
#pragma once

#include "hopper.cuh"
#include "sweep.cuh"

namespace mio_ext {

// A stage of column tiles, in shared memory at `smem`, and its barriers.
template <class T>
struct PipelineState {
  uint32_t smem;
  int stage = 0;
  uint32_t parity = 0;  // of the phase that this round ends

  MIO_DEVICE uint32_t columns() const { return smem + T::kColumnsAt + stage * T::kStageBytes; }
  MIO_DEVICE uint32_t full() const { return smem + T::kBarriersAt + 8 * stage; }
  MIO_DEVICE uint32_t empty() const { return full() + 8 * T::kStages; }
  MIO_DEVICE uint32_t rows_there() const { return smem + T::kBarriersAt + 16 * T::kStages; }
  MIO_DEVICE void next() {
    if (++stage == T::kStages) stage = 0, parity ^= 1;
  }
};

// One thread copies the block's rows and the tiles of columns first to end - 1.
template <class T>
MIO_DEVICE void produce(const Sweep& in, uint32_t smem, int first, int end) {
  const auto* rows = static_cast<const unsigned char*>(in.rows.z) + int64_t(blockIdx.x) * (T::kBlockM * T::kRowBytes);
  PipelineState<T> state{smem};
  mbarrier_arrive_expecting(state.rows_there(), T::kBlockM * T::kRowBytes);
  bulk_copy(smem, rows, T::kBlockM * T::kRowBytes, state.rows_there());
  for (int col0 = first; col0 < end; col0 += T::kBlockN, state.next()) {
    const auto* columns = static_cast<const unsigned char*>(in.cols.z) + row_at(T::kLayout, col0, T::kRowBytes);
    mbarrier_wait(state.empty(), state.parity ^ 1);
    mbarrier_arrive_expecting(state.full(), T::kBlockN * (T::kRowBytes + (in.cols.ids ? 8 : 4)));
    for (int block = 0; block < T::kBlocks; ++block)
      bulk_copy(state.columns() + block * T::kBlockN * kBlockRowBytes, columns + block * kRowMultiple * kBlockRowBytes,
                T::kBlockN * kBlockRowBytes, state.full());
    bulk_copy(state.columns() + T::kFactorsAt, in.cols.factors + col0, T::kBlockN * 4, state.full());
    if (in.cols.ids) bulk_copy(state.columns() + T::kKeysAt, in.cols.keys + col0, T::kBlockN * 4, state.full());
  }
}

// s = x y^T (2), but for the norms: the consumer's rows, and a tile of columns.
template <class A, class T>
MIO_DEVICE void start_logits(float (&s)[T::kBlockN / 8][4], Descriptor rows, Descriptor columns) {
#pragma unroll
  for (int step = 0; step < T::kWidth / 16; ++step) {
    const uint32_t block = step / 4, inside = step % 4 * 32;
    wgmma(typename A::Element{}, s, rows + (block * T::kBlockM * kBlockRowBytes + inside),
          columns + (block * T::kBlockN * kBlockRowBytes + inside), step > 0);
  }
}

// acc += g y (9), with G as left_operand() makes it.
template <class A, class T>
MIO_DEVICE void start_gradient(float (&acc)[1][T::kWidth / 8][4], const uint32_t (&g)[T::kBlockN / 16][1][4],
                               uint32_t columns_at) {
  constexpr int kEach = T::kWidth < 128 ? T::kWidth : 128, kNextBlock = T::kBlockN * kBlockRowBytes;  // of a product
  const Descriptor columns(columns_at, kNextBlock);
#pragma unroll
  for (int step = 0; step < T::kBlockN / 16; ++step)
#pragma unroll
    for (int f = 0; f < T::kWidth; f += kEach)
      wgmma(typename A::Element{}, reinterpret_cast<float (&)[kEach / 8][4]>(acc[0][f / 8]), g[step][0],
            columns + (f / kBlockFeatures * kNextBlock + step * 16 * kBlockRowBytes));
}

template <class Register, int N>
MIO_DEVICE void hold_all(Register (&r)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) hold(r[n][i]);
}

// Grid: [row blocks, splits].
template <class A, int kWidth, bool kIds>
__global__ void __launch_bounds__(HopperTile<A, kWidth>::kThreads + HopperTile<A, kWidth>::kProducerThreads, 1)
    sweep_hopper_kernel(const Sweep in) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  trap();  // such code is never chosen: hopper_is_built() is false
#else
  using T = HopperTile<A, kWidth>;
  constexpr int N = T::kBlockN / 8;
  const uint32_t smem = shared_address(shared_memory());
  if (threadIdx.x == 0) {
    if (smem % 1024 != 0) trap();
    PipelineState<T> state{smem};
    for (int i = 0; i < T::kStages; ++i, state.next())
      mbarrier_init(state.full(), 1), mbarrier_init(state.empty(), T::kWarps);
    mbarrier_init(state.rows_there(), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  const int split = in.tiles_per_split * T::kBlockN, first = blockIdx.y * split;
  const int end = in.cols.n - first < split ? in.cols.n : first + split;
  if (threadIdx.x >= T::kThreads) {
    fewer_registers<T::kProducerRegisters>();
    if (threadIdx.x == T::kThreads) produce<T>(in, smem, first, end);
    return;
  }
  more_registers<T::kConsumerRegisters>();

  const int consumer = uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
  const int block_row0 = blockIdx.x * T::kBlockM, consumer_row0 = block_row0 + consumer * T::kConsumerRows;
  const int row0 = block_row0 + threadIdx.x / 32 * 16 + lane / 4;  // this thread's first
  const Descriptor rows(smem + consumer * T::kConsumerRows * kBlockRowBytes);
  // Of columns, before which a tile's pairs are all there: none, if only some of this consumer's rows are. The same for
  // its four warps, which wait for products in branches that this decides.
  const int there = uniform(is_cut(consumer_row0, T::kConsumerRows, in.rows.n) ? 0 : in.cols.n);
  const Crossings crossings = in.pairs.crossings(consumer_row0, T::kConsumerRows, T::kBlockN);
  const int my_barrier = 1 + consumer, other_barrier = 2 - consumer;
  const Coefficients coefficients(read_params(in.results.constants, in.results.params));
  TileTerms<A, 1, kIds, GatheredFactors, T::kProductsInLoop> terms(in.rows, in.cols, in.pairs, row0, coefficients,
                                                                   in.normalize, in.loss);
  float acc[1][kWidth / 8][4] = {}, s[1][N][4];
  uint32_t g[N / 2][1][4] = {};
  if (consumer == 1) barrier_arrive(other_barrier, T::kThreads);  // the first turn is the other's

  PipelineState<T> state{smem}, last{smem};
  mbarrier_wait(state.rows_there(), 0);
  int col0 = first;
  for (int left = ceil_div(end - first, T::kBlockN); left > 0; --left, col0 += T::kBlockN, state.next()) {
    const bool crossed = col0 + T::kBlockN > there || crossings.at(col0);
    mbarrier_wait(state.full(), state.parity);
    barrier_wait(my_barrier, T::kThreads);
    wgmma_fence();
    start_logits<A, T>(s[0], rows, Descriptor(state.columns()));
    wgmma_commit();
    start_gradient<A, T>(acc, g, last.columns());  // of the tile before; for the first, of zeros
    wgmma_commit();
    if (consumer == 0 || left > 1) barrier_arrive(other_barrier, T::kThreads);
    auto ready = [&] {
      wgmma_wait<1>();
      hold_all(s[0]);
    };
    terms.template tile<T::kFactorsAhead>(s, ready, state.columns() + T::kFactorsAt, state.columns() + T::kKeysAt, col0,
                                          crossed);
    wgmma_wait<0>();
    hold_all(acc[0]);
#pragma unroll
    for (int step = 0; step < N / 2; ++step) hold_all(g[step]);
    if (last.stage != state.stage) {
      sync_warp();
      if (fresh_thread_index() % 32 == 0) mbarrier_arrive(last.empty());
    }
#pragma unroll
    for (int step = 0; step < N / 2; ++step) left_operand<A, N>(g[step], s[0], step);
    last = state;
  }
  wgmma_fence();
  start_gradient<A, T>(acc, g, last.columns());
  wgmma_commit();
  wgmma_wait<0>();
  hold_all(acc[0]);

  if (in.grad) store_part<T>(in, acc, row0, blockIdx.y);
  __syncthreads();  // of the consumers: the producer has left. Shared memory changes its use
  double sums[kSums];
  terms.total(sums);
  end_sweep<A, T, kIds>(in, sums);
#endif
}

}  // namespace mio_ext
