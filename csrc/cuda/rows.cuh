// SPDX-License-Identifier: Apache-2.0
// Rows in global memory, eight numbers at a time: 16 bytes in one instruction wherever they lie at a multiple of 16.
#pragma once

#include <type_traits>

#include "tile.h"

namespace mio_ext {

MIO_DEVICE bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

MIO_DEVICE float dot_eight(const float (&a)[8], const float (&b)[8]) {
  float sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = a[i] * b[i] + a[i + 4] * b[i + 4];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Sum over groups of kLanes neighbouring lanes.
template <int kLanes>
MIO_DEVICE float sum_lanes(float v) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

// ---------------------------------------------------------------- features, aligned

template <class Half>
MIO_DEVICE void unpack_eight(Half, float (&v)[8], const uint32_t (&packed)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = to_float(Half{uint16_t(packed[i])});
    v[2 * i + 1] = to_float(Half{uint16_t(packed[i] >> 16)});
  }
}
template <class Half>
MIO_DEVICE void load_eight(float (&v)[8], const Half* at) {
  const uint4 w = *reinterpret_cast<const uint4*>(at);
  const uint32_t packed[4] = {w.x, w.y, w.z, w.w};
  unpack_eight(Half{}, v, packed);
}
MIO_DEVICE void load_eight(float (&v)[8], const float* at) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 w = *reinterpret_cast<const float4*>(at + i);
    v[i] = w.x, v[i + 1] = w.y, v[i + 2] = w.z, v[i + 3] = w.w;
  }
}

// v becomes what was stored.
template <class Half>
MIO_DEVICE void store_eight(Half* at, float (&v)[8]) {
  uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) packed[i] = pack(Half{}, v[2 * i], v[2 * i + 1]);
  *reinterpret_cast<uint4*>(at) = {packed[0], packed[1], packed[2], packed[3]};
  unpack_eight(Half{}, v, packed);
}
MIO_DEVICE void store_eight(float* at, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) *reinterpret_cast<float4*>(at + i) = {v[i], v[i + 1], v[i + 2], v[i + 3]};
}

// Eight features of a row of the copy, `width` features wide. put_eight() leaves in v what the copy has of it.
template <class A>
MIO_DEVICE void put_eight(typename A::Element* at, int width, float (&v)[8]) {
  if constexpr (A::kParts == 2) {
    float low[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) low[i] = v[i];
    store_eight(at, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) low[i] -= v[i];
    store_eight(at + width, low);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += low[i];
  } else {
    if constexpr (std::is_same_v<A, Tf32>) {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = round_to_tf32(v[i]);
    }
    store_eight(at, v);
  }
}
template <class A>
MIO_DEVICE void get_eight(float (&v)[8], const typename A::Element* at, int width) {
  load_eight(v, at);
  if constexpr (A::kParts == 2) {
    float low[8];
    load_eight(low, at + width);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += low[i];
  }
}

// ---------------------------------------------------------------- gradients, [n, d] of float32

// Whether all rows begin at multiples of 16 bytes, and no four numbers cross a row's end.
MIO_DEVICE bool rows_are_aligned(const float* data, int d) { return d % 4 == 0 && is_aligned(data); }

// Numbers f to f + 7 of a row, 0 past its end; other blocks may have written them.
template <bool kAligned>
MIO_DEVICE void add_row_eight(float (&v)[8], const float* row, int f, int d) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    if constexpr (kAligned) {
      if (f + i >= d) continue;
      const float4 w = load_fresh(reinterpret_cast<const float4*>(row + f + i));
      v[i] += w.x, v[i + 1] += w.y, v[i + 2] += w.z, v[i + 3] += w.w;
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j)
        if (f + j < d) v[j] += load_fresh(row + f + j);
    }
  }
}
MIO_DEVICE void store_row_eight(float* row, int f, int d, bool aligned, const float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    if (aligned) {
      if (f + i < d) *reinterpret_cast<float4*>(row + f + i) = {v[i], v[i + 1], v[i + 2], v[i + 3]};
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j)
        if (f + j < d) row[f + j] = v[j];
    }
  }
}

}  // namespace mio_ext
