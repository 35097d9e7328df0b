// SPDX-License-Identifier: Apache-2.0
// What is done once a row, before and after the sweep over all pairs: the copy the tensor cores read, the
// positive pair, and the gradient's way back through the norm.
//
// The copy is dense, aligned and padded with zeros, so the sweep needs no mask; each row is scaled by a power of
// two to a largest element in [1, 2). That is exact, and it leaves of any norm a float32 factor in
// [1 / sqrt(4 D), 1], which may pass through 16 bits. Without normalize rows are copied as they are, but for
// float32 in halves, whose range is float16's.
#pragma once

#include "pairwise_bce_cuda.h"
#include "rows.cuh"

namespace mio_ext {

constexpr float kLn2 = 0.693147180559945f;
constexpr float kLog2e = 1.442695040888963f;

// A side of the problem as prepare_kernel leaves it.
struct Prepared {
  void* z;             // [n_pad, parts, width] of what the tensor cores take, or tiled
  float* inverse;      // [n_pad] the unit vector is z' inverse, for the copy z'; eq. (1)
  float* back;         // [n_pad] dL/dz = (I - z^ z^T) dL/dz^ back; eq. (10)
  float* half_norm;    // [n_pad] |z^|^2 / 2, for the distance in eq. (12), with ids
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

  MIO_DEVICE void to(PairSums& out, const Scales& scales) {
    const Term term(-(product * scales.p + scales.bias));
    out.positive.count += 1;
    out.positive.softplus += kLn2 * (term.relu + log2_1p(term.e));
    out.positive.product += product;
    out.positive.sigmoid += term.sigmoid;
    out.positive.sigmoid_prod += term.sigmoid * product;
    out.distance += distance;
    weight = scales.weight_p * term.sigmoid;
  }

  MIO_DEVICE void add_gradient(float (&g)[8], const float (&x)[8], const float (&y)[8], const Scales& scales) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] += scales.weight_l * (x[i] - y[i]) - weight * y[i];
  }
};

constexpr int kPrepareWarps = 4;
// Lanes of a warp that share a row: up to kMaxFusedFeatures features, and more.
constexpr int kRowLanes = 8, kWideRowLanes = 32;

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

// The power of two that brings the largest of numbers to [1, 2); by the bits of their magnitudes, in which NaN is
// largest. kLanes lanes bring theirs.
template <int kLanes>
MIO_DEVICE float power_to_one(uint32_t largest) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(largest, mask);
    largest = other > largest ? other : largest;
  }
  const int exponent = 254 - int(largest >> 23);
  return float_of(uint32_t(exponent < 1 ? 1 : exponent > 253 ? 253 : exponent) << 23);
}

// A row as it comes, eight features at a time, 0 past its end.
template <class Feature>
struct FeatureRow {
  const Feature* z;
  int64_t stride;
  int d;
  bool aligned;  // 16 bytes may be read at once

  MIO_DEVICE FeatureRow(const Prepare& in, int side, int row) : d(row < in.out[side].n ? in.d : 0) {
    const bool more = side == 0 && row >= in.first;
    const Features& from = more ? in.more : in.features[side];
    z = static_cast<const Feature*>(from.data) + int64_t(more ? row - in.first : row) * from.row_stride;
    stride = from.col_stride;
    aligned = stride == 1 && is_aligned(z);
  }
  MIO_DEVICE void eight(float (&v)[8], int f) const {
    if (aligned && f + 8 <= d) return load_eight(v, z + f);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = f + i < d ? to_float(z[(f + i) * stride]) : 0;
  }
};

// kLanes lanes copy a row and make its factors.
template <class A, int kLanes>
MIO_DEVICE void prepare_row(const Prepare& in, int side, int row) {
  const int lane = threadIdx.x % kLanes;
  const Prepared& out = in.out[side];
  const FeatureRow<typename A::Feature> features(in, side, row);
  using Element = typename A::Element;

  float power = 1;
  if (in.normalize || A::kParts == 2) {
    uint32_t largest = 0;
    for (int f = 8 * lane; f < features.d; f += 8 * kLanes) {
      float v[8];
      features.eight(v, f);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t magnitude = bits_of(v[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
    }
    power = power_to_one<kLanes>(largest);
  }
  float norm2 = 0;
  auto* copy = reinterpret_cast<Element*>(static_cast<unsigned char*>(out.z) +
                                          row_at(out.tiled, row, in.width * A::kParts * int(sizeof(Element))));
  for (int f = 8 * lane; f < in.width; f += 8 * kLanes) {
    float v[8];
    features.eight(v, f);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= power;
    put_eight<A>(copy + feature_at(out.tiled, row, f), in.width, v);
    norm2 += dot_eight(v, v);
  }
  norm2 = sum_lanes<kLanes>(norm2);
  if (lane != 0) return;
  const float norm = sqrtf(norm2), least = power * float(kNormEps);
  const float inverse = in.normalize ? 1 / (norm > least || norm != norm ? norm : least) : 1 / power;
  out.inverse[row] = inverse;
  out.back[row] = in.normalize ? (norm <= least ? 0 : power / norm) : 1;
  out.half_norm[row] = 0.5f * (norm * inverse) * (norm * inverse);
}

// Eight features of a row's unit vector (1), from the copy.
template <class A>
MIO_DEVICE void unit_eight(float (&v)[8], const Prepared& from, bool tiled, int row, int width, int f, float inverse) {
  using Element = typename A::Element;
  const auto* at = reinterpret_cast<const Element*>(static_cast<const unsigned char*>(from.z) +
                                                    row_at(tiled, row, width * A::kParts * int(sizeof(Element))));
  get_eight<A>(v, at + feature_at(tiled, row, f), width);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = rounded_product(v[i], inverse);
}

MIO_DEVICE void clear_tickets(const Prepare& in) {
  for (int i = threadIdx.x; i < in.n_tickets; i += blockDim.x) in.tickets[i] = 0;
}

// Grid: [row blocks, sides].
template <class A, int kLanes>
__global__ void __launch_bounds__(32 * kPrepareWarps) prepare_kernel(const Prepare in) {
  if (blockIdx.x == 0 && blockIdx.y == 0) clear_tickets(in);
  const int row = (blockIdx.x * 32 * kPrepareWarps + threadIdx.x) / kLanes;
  if (row < in.out[blockIdx.y].n_pad) prepare_row<A, kLanes>(in, blockIdx.y, row);  // the same for a whole warp
}

// ---------------------------------------------------------------- sums over a block, in one order

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
