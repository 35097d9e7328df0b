// SPDX-License-Identifier: Apache-2.0
// The copy that the tensor cores read, made once a row.
//
// It is dense, aligned and padded with zeros, so the sweep needs no mask; each row is scaled by a power of two to a
// largest element in [1, 2). That is exact, and it leaves of any norm a float32 factor in [1 / sqrt(4 D), 1], which may
// pass through 16 bits. Without normalize rows are copied as they are, but for float32 in halves, whose range is
// float16's.
#pragma once

#include "launch.h"
#include "rows.cuh"

namespace mio_ext {

// A side of the problem as prepare_kernel leaves it.
struct Prepared {
  void* z;             // [n_pad, parts, width] of what the tensor cores take, in `layout`
  void* dense;         // [n_pad, width] the same again, for a library; or nullptr
  float* inverse;      // [n_pad] the unit vector is z' inverse, for the copy z'; eq. (1)
  float* factors;      // [n_pad] the same, of row r in the place of gathered(r); if tiled
  float* back;         // [n_pad] dL/dz = (I - z^ z^T) dL/dz^ back; eq. (10)
  float* half_norm;    // [n_pad] |z^|^2 / 2, for the distance in eq. (12), with ids
  const int64_t* ids;  // [n] or nullptr
  uint32_t* keys;      // [n_pad] of the ids, if there are any: different keys, different ids
  int n, n_pad;
  Layout layout;
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
  if (lane == 0 && out.ids) out.keys[row] = row < out.n ? key_of(out.ids[row]) : 0;
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
                                          row_at(out.layout, row, in.width * A::kParts * int(sizeof(Element))));
  for (int f = 8 * lane; f < in.width; f += 8 * kLanes) {
    float v[8];
    features.eight(v, f);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= power;
    put_eight<A>(copy + feature_at(out.layout, row, f), in.width, v);
    if constexpr (sizeof(Element) == 2 && A::kParts == 1) {
      if (out.dense) store_eight(static_cast<Element*>(out.dense) + int64_t(row) * in.width + f, v);
    }
    norm2 += dot_eight(v, v);
  }
  norm2 = sum_lanes<kLanes>(norm2);
  if (lane != 0) return;
  const float norm = sqrtf(norm2), least = power * float(kNormEps);
  const float inverse = in.normalize ? 1 / (norm > least || norm != norm ? norm : least) : 1 / power;
  out.inverse[row] = inverse;
  if (out.layout == Layout::kTiled) out.factors[gathered(row)] = inverse;
  out.back[row] = in.normalize ? (norm <= least ? 0 : power / norm) : 1;
  out.half_norm[row] = 0.5f * (norm * inverse) * (norm * inverse);
}

// Eight features of a row's unit vector (1), from the copy.
template <class A>
MIO_DEVICE void unit_eight(float (&v)[8], const Prepared& from, Layout layout, int row, int width, int f,
                           float inverse) {
  using Element = typename A::Element;
  const auto* at = reinterpret_cast<const Element*>(static_cast<const unsigned char*>(from.z) +
                                                    row_at(layout, row, width * A::kParts * int(sizeof(Element))));
  get_eight<A>(v, at + feature_at(layout, row, f), width);
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

}  // namespace mio_ext
