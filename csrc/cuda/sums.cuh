// SPDX-License-Identifier: Apache-2.0
// Sums over a block and over all blocks, in one order, and the results that they amount to. Float sums are never added
// atomically: the block that comes last, known by a ticket, adds up what the others wrote.
#pragma once

#include "launch.h"
#include "rows.cuh"

namespace mio_ext {

// A scale that is not positive and finite means nothing: NaN, and the loss with it.
MIO_DEVICE LossParams read_params(const LossParams& constants, const float* params) {
  LossParams v = constants;
  if (params) v = {params[0], params[1], params[2], params[3], params[4], params[5]};
  constexpr double kLargest = 3.4028234663852886e38;
  const double nan = float_of(0x7fffffffu);
  if (!(v.scale_p > 0 && v.scale_p <= kLargest)) v.scale_p = nan;
  if (!(v.scale_n > 0 && v.scale_n <= kLargest)) v.scale_n = nan;
  return v;
}

// The fields of PairSums by number, which may not be known to the compiler.
constexpr int kSums = sizeof(PairSums) / sizeof(double);
MIO_DEVICE double* fields(PairSums* sums) { return &sums->positive.count; }

MIO_DEVICE void to_array(PairSums& from, double (&to)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) to[i] = fields(&from)[i];
}
// sums = more, or += it
MIO_DEVICE void add_to(double (&sums)[kSums], PairSums more, bool add) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = (add ? sums[i] : 0) + fields(&more)[i];
}

// Leaves the sums of all threads in *total; scratch: [warps, kSums] that nobody else uses. Both are shared memory.
template <int kWarps>
MIO_DEVICE void block_total(const double (&mine)[kSums], double* scratch, PairSums* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    double v = mine[i];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    if (lane == 0) scratch[warp * kSums + i] = v;
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    double v = 0;
    for (int w = 0; w < kWarps; ++w) v += scratch[w * kSums + threadIdx.x];
    fields(total)[threadIdx.x] = v;
  }
  __syncthreads();
}

// True in all threads of the block that comes last; it sees what the others wrote before.
MIO_DEVICE bool last_to_arrive(unsigned* ticket, unsigned blocks, unsigned* shared_flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared_flag = atomicAdd(ticket, 1u) == blocks - 1;
  __syncthreads();
  const bool last = *shared_flag != 0;
  if (last) __threadfence();
  return last;
}

struct Results {
  LossParams constants;
  const float* params;
  float* loss;
  double* stats;   // [8], the fields of reference.PairStats
  float* dparams;  // [6] or nullptr
};

MIO_DEVICE void write_results(const Results& out, const PairSums& s) {
  const LossParams params = read_params(out.constants, out.params);
  *out.loss = float(params.loss(s));
  s.statistics(out.stats);
  if (!out.dparams) return;
  double gradient[6];
  params.gradient(s, gradient);
  for (int i = 0; i < 6; ++i) out.dparams[i] = float(gradient[i]);
}

// Adds up all records, and more of each thread, and writes what they amount to; for one block, with shared memory as in
// block_total().
template <int kWarps>
MIO_DEVICE void sum_records(PairSums* records, int count, const Results& out, double* scratch, PairSums* total,
                            PairSums more = {}) {
  double mine[kSums];
  to_array(more, mine);
  for (int r = threadIdx.x; r < count; r += 32 * kWarps) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) mine[i] += load_fresh(fields(&records[r]) + i);
  }
  block_total<kWarps>(mine, scratch, total);
  if (threadIdx.x == 0) write_results(out, *total);
}

}  // namespace mio_ext
