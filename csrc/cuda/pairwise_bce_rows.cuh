// SPDX-License-Identifier: Apache-2.0
// What is done once a row, before and after the sweep over all pairs: the copy the tensor cores read, the
// positive pair, and the gradient's way back through the norm.
//
// The copy is dense, aligned and padded with zeros, so the sweep needs no mask; each row is scaled by a power of
// two to a largest element in [1, 2). That is exact, and it leaves of any norm a float32 factor in
// [1 / sqrt(4 D), 1], which may pass through 16 bits. Without normalize rows are copied as they are, but for
// float32 in halves, whose range is float16's.
#pragma once

#include <type_traits>

#include "pairwise_bce_cuda.h"
#include "pairwise_bce_tile.h"

namespace mio_ext {

constexpr float kLn2 = 0.693147180559945f;
constexpr float kLog2e = 1.442695040888963f;

// A side of the problem as prepare_kernel leaves it.
struct Prepared {
  void* z;             // [n_pad, parts, width] of what the tensor cores take, or tiled
  float* inverse;      // [n_pad] the unit vector is z' inverse, for the copy z'; eq. (1)
  float* back;         // [n_pad] dL/dz = (I - z^ z^T) dL/dz^ back; eq. (10)
  float* half_norm;    // [n_pad] |z^|^2 / 2, for the distance in eq. (12)
  const int64_t* ids;  // [n] or nullptr
  int n, n_pad;
  bool tiled;
};

// e = 2^-|t| of a base-2 logit t gives max(t, 0), and with one reciprocal sigma(t). NaN stays NaN.
struct Term {
  float e, relu, sigmoid;
  MIO_DEVICE explicit Term(float t) {
    const bool below = t < 0;
    e = exp2_approx(-fabsf(t));
    relu = below ? 0 : t;
    const float r = reciprocal(1 + e);
    sigmoid = below ? e * r : r;
  }
};

// log2(1 + v) for v >= 0, to the last bits where v is tiny: the rounding of 1 + v cancels.
MIO_DEVICE float log2_1p(float v) {
  const float w = 1 + v;
  return w == 1 ? v * kLog2e : log2f(w) * (v / (w - 1));
}

struct Scales {
  float p, n, bias;                    // of the logits, base 2
  float weight_p, weight_n, weight_l;  // d loss / d (x.y) is weight_n sigma, or -weight_p sigma - weight_l

  MIO_DEVICE explicit Scales(const LossParams& v)
      : p(float(v.scale_p) * kLog2e),
        n(float(v.scale_n) * kLog2e),
        bias(float(v.bias) * kLog2e),
        weight_p(float(v.weight_p * v.scale_p)),
        weight_n(float(v.weight_n * v.scale_n)),
        weight_l(float(v.weight_l)) {}
};

// Adds a positive pair to the sums, from the product of its copies. What the column's copy weighs in the gradient
// of the row's unit vector, eq. (7).
MIO_DEVICE float add_positive(PairSums& out, float product, const Prepared& rows, int row, const Prepared& cols,
                              int column, const Scales& scales) {
  const float inverse = cols.inverse[column];
  product *= inverse * rows.inverse[row];
  const Term term(-(product * scales.p + scales.bias));
  out.positive.count += 1;
  out.positive.softplus += kLn2 * (term.relu + log2_1p(term.e));
  out.positive.product += product;
  out.positive.sigmoid += term.sigmoid;
  out.positive.sigmoid_prod += term.sigmoid * product;
  out.distance += rows.half_norm[row] + cols.half_norm[column] - product;
  return -(scales.weight_p * term.sigmoid + scales.weight_l) * inverse;
}

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

// Sum over groups of kLanes neighbouring lanes.
template <int kLanes>
MIO_DEVICE float sum_lanes(float v) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

constexpr int kPrepareWarps = 4;

struct Prepare {
  Features features[2];
  Features more;  // rows of side 0 from `first` on
  int first;
  Prepared out[2];
  int sides;
  int d, width;
  bool normalize;
  unsigned* tickets;  // to be zeroed
  int n_tickets;
};

MIO_DEVICE Bfloat16 times_power(Bfloat16 v, float power) { return {uint16_t(bits_of(to_float(v) * power) >> 16)}; }
MIO_DEVICE Float16 times_power(Float16 v, float power) {
  return {uint16_t(pack(Float16{}, to_float(v) * power, 0.0f))};
}
MIO_DEVICE float times_power(float v, float power) { return v * power; }

// Feature f of a row of the copy, and back.
template <class A>
MIO_DEVICE void put_feature(typename A::Element* row, int f, int width, typename A::Feature v) {
  if constexpr (A::kParts == 2) {
    row[f] = Float16{uint16_t(pack(Float16{}, v, 0.0f))};
    row[width + f] = Float16{uint16_t(pack(Float16{}, v - to_float(row[f]), 0.0f))};
  } else if constexpr (std::is_same_v<A, Tf32>) {
    row[f] = round_to_tf32(v);
  } else {
    row[f] = v;
  }
}
template <class A>
MIO_DEVICE float get_feature(const typename A::Element* row, int f, int width) {
  float v = to_float(row[f]);
  if constexpr (A::kParts == 2) {
    v += to_float(row[width + f]);
  }
  return v;
}

// A warp copies a row and makes its factors.
template <class A>
MIO_DEVICE void prepare_row(const Prepare& in, int side, int row) {
  const int lane = threadIdx.x % 32;
  const bool more = side == 0 && row >= in.first;
  const Features& from = more ? in.more : in.features[side];
  const Prepared& out = in.out[side];
  using Feature = typename A::Feature;
  using Element = typename A::Element;
  const Feature* z = static_cast<const Feature*>(from.data) + int64_t(more ? row - in.first : row) * from.row_stride;
  const int d = row < out.n ? in.d : 0;
  auto load = [&](int f) { return z[f * from.col_stride]; };

  float power = 1;
  if (in.normalize || A::kParts == 2) {
    uint32_t largest = 0;
    for (int f = lane; f < d; f += 32) {
      const uint32_t magnitude = bits_of(to_float(load(f))) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      const uint32_t other = shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    const int exponent = 254 - int(largest >> 23);
    power = float_of(uint32_t(exponent < 1 ? 1 : exponent > 253 ? 253 : exponent) << 23);
  }
  float norm2 = 0;
  auto* copy = reinterpret_cast<Element*>(static_cast<unsigned char*>(out.z) +
                                          row_at(out.tiled, row, in.width * A::kParts * int(sizeof(Element))));
  for (int f = lane; f < in.width; f += 32) {
    const int at = feature_at(out.tiled, row, f);
    put_feature<A>(copy, at, in.width, f < d ? times_power(load(f), power) : Feature{});
    const float v = get_feature<A>(copy, at, in.width);
    norm2 += v * v;
  }
  norm2 = sum_lanes<32>(norm2);
  if (lane != 0) return;
  const float norm = sqrtf(norm2), least = power * float(kNormEps);
  const float inverse = in.normalize ? 1 / (norm > least || norm != norm ? norm : least) : 1 / power;
  out.inverse[row] = inverse;
  out.back[row] = in.normalize ? (norm <= least ? 0 : power / norm) : 1;
  out.half_norm[row] = 0.5f * (norm * inverse) * (norm * inverse);
}

MIO_DEVICE void clear_tickets(const Prepare& in) {
  for (int i = threadIdx.x; i < in.n_tickets; i += blockDim.x) in.tickets[i] = 0;
}

// Grid: [row blocks, sides].
template <class A>
__global__ void __launch_bounds__(32 * kPrepareWarps) prepare_kernel(const Prepare in) {
  if (blockIdx.x == 0 && blockIdx.y == 0) clear_tickets(in);
  const int row = blockIdx.x * kPrepareWarps + threadIdx.x / 32;
  if (row < in.out[blockIdx.y].n_pad) prepare_row<A>(in, blockIdx.y, row);
}

// ---------------------------------------------------------------- sums over a block, in one order

// The fields of PairSums by number, which may not be known to the compiler.
constexpr int kSums = sizeof(PairSums) / sizeof(double);
MIO_DEVICE double* fields(PairSums* sums) { return &sums->positive.count; }

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
  const ClassSums &p = s.positive, &n = s.negative;
  *out.loss = float(params.loss(s));
  const double stats[8] = {p.count,
                           n.count,
                           p.softplus / p.count,
                           n.softplus / n.count,
                           p.product / p.count,
                           n.product / n.count,
                           1 - p.sigmoid / p.count,
                           n.sigmoid / n.count};
  for (int i = 0; i < 8; ++i) out.stats[i] = stats[i];
  if (!out.dparams) return;
  double gradient[6];
  params.gradient(s, gradient);
  for (int i = 0; i < 6; ++i) out.dparams[i] = float(gradient[i]);
}

// Adds up all records and writes what they amount to; for one block, with shared memory as in block_total().
template <int kWarps>
MIO_DEVICE void sum_records(PairSums* records, int count, const Results& out, double* scratch, PairSums* total) {
  double mine[kSums] = {};
  for (int r = threadIdx.x; r < count; r += 32 * kWarps) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) mine[i] += load_fresh(fields(&records[r]) + i);
  }
  block_total<kWarps>(mine, scratch, total);
  if (threadIdx.x == 0) write_results(out, *total);
}

}  // namespace mio_ext
