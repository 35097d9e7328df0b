// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/cuda/ on the CPU, so that their values can be tested without a GPU. mma.cuh includes it in
// place of its PTX.
//
// A cp.async turns its target into NaN and only delivers at the wait, sums in the tensor cores are cut off, and
// conflicting accesses to shared memory end the program.
#pragma once

#include <cmath>

#include "emulated_machine.h"

namespace emulator {

// float32 from a sum in double, cut off as the tensor cores do.
inline float cut_off(double v) {
  const float r = float(v);
  return std::abs(double(r)) > std::abs(v) ? std::nextafter(r, 0.0f) : r;
}

}  // namespace emulator

namespace mio_ext {

inline float rounded_product(float a, float b) { return a * b; }

// A GPU's arithmetic has one NaN, of which no bit is 0; the CPU's carry bits of their own.
inline uint32_t bits_of(float v) {
  if (v != v) return 0x7fffffffu;
  uint32_t r;
  std::memcpy(&r, &v, 4);
  return r;
}
inline float float_of(uint32_t v) {
  float r;
  std::memcpy(&r, &v, 4);
  return r;
}

inline void sync_grid(MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  emulator::wait_as(emulator::State::kAtGrid);
}

inline unsigned char* shared_memory() { return emulator::machine.shared; }
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - emulator::machine.shared);
}

struct MatrixLoad {
  uint32_t address;
  uint32_t* r;
};
template <bool kTrans>
void ldmatrix_op(void** lanes) {
  auto lane = [&](int l) -> MatrixLoad& { return *static_cast<MatrixLoad*>(lanes[l]); };
  for (int m = 0; m < 4; ++m) {
    const unsigned char* rows[8];
    unsigned banks = 0;
    for (int i = 0; i < 8; ++i) {
      rows[i] = emulator::at_shared(lane(8 * m + i).address, 16);
      banks |= 1u << lane(8 * m + i).address / 16 % 8;
    }
    if (banks != 0xff) emulator::fail("ldmatrix with a bank conflict");
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, q = l % 4;
      unsigned char* to = reinterpret_cast<unsigned char*>(&lane(l).r[m]);
      if (!kTrans) std::memcpy(to, rows[g] + 4 * q, 4);
      if (kTrans) std::memcpy(to, rows[2 * q] + 2 * g, 2), std::memcpy(to + 2, rows[2 * q + 1] + 2 * g, 2);
    }
  }
}
inline void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  MatrixLoad load{address, r};
  emulator::collective(&load, ldmatrix_op<false>);
}
inline void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
  MatrixLoad load{address, r};
  emulator::collective(&load, ldmatrix_op<true>);
}

inline void check_banks_op(void** lanes) {
  uint32_t word[32];
  for (uint32_t& w : word) w = ~0u;
  for (int l = 0; l < 32; ++l) {
    const uint32_t at = *static_cast<uint32_t*>(lanes[l]) / 4;
    if (word[at % 32] != ~0u && word[at % 32] != at) emulator::fail("a load with a bank conflict");
    word[at % 32] = at;
  }
}
template <class T>
T shared_value(uint32_t address) {
  T v;
  std::memcpy(&v, emulator::at_shared(address, sizeof(T)), sizeof(T));
  return v;
}
inline uint32_t load_shared(uint32_t address) {
  emulator::collective(&address, check_banks_op);
  return shared_value<uint32_t>(address);
}
inline float2 load_shared_pair(uint32_t address) { return shared_value<float2>(address); }
inline float4 load_shared_four(uint32_t address) { return shared_value<float4>(address); }
inline uint2 load_shared_words(uint32_t address) { return shared_value<uint2>(address); }

inline void cp_async(uint32_t to, const void* from, MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::fail("cp.async from a misaligned address");
  std::memset(emulator::at_shared(to, 16), 0xff, 16);
  emulator::self().groups.back().push_back({to, from});
}
inline void cp_async_commit(MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  emulator::self().groups.emplace_back();
}
template <int kOpenGroups>
void cp_async_wait(MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  auto& groups = emulator::self().groups;
  while (groups.size() > kOpenGroups + 1) {
    for (const emulator::Copy& copy : groups.front()) std::memcpy(emulator::at_shared(copy.to, 16), copy.from, 16);
    groups.erase(groups.begin());
  }
}

inline float to_float(Float16 v) {
  _Float16 h;
  std::memcpy(&h, &v, 2);
  return float(h);
}
inline uint32_t pack(Float16, float low, float high) {
  const _Float16 pair[2] = {_Float16(low), _Float16(high)};
  uint32_t r;
  std::memcpy(&r, pair, 4);
  return r;
}
inline uint32_t pack(Bfloat16, float low, float high) {
  auto narrow = [](float v) {
    const uint32_t bits = bits_of(v);
    return v != v ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return narrow(low) | narrow(high) << 16;
}

// Number `i` of a register: of two 16-bit numbers, or the one TF32 number, whose low bits the tensor cores ignore.
inline float part(Bfloat16, uint32_t r, int i) { return float_of(i ? r & 0xffff0000u : r << 16); }
inline float part(Float16, uint32_t r, int i) { return to_float(Float16{uint16_t(i ? r >> 16 : r)}); }
inline float part(float, uint32_t r, int) { return float_of(r & 0xffffe000u); }

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
template <class T>
void mma_op(void** lanes) {
  constexpr int kPacked = 4 / sizeof(T), kDepth = 8 * kPacked;
  float a[16][kDepth], b[kDepth][8];
  for (int l = 0; l < 32; ++l) {
    const Product& p = *static_cast<Product*>(lanes[l]);
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < kPacked; ++j) {
        const int k = l % 4 * kPacked + j + i / 2 * kDepth / 2;
        a[l / 4 + i % 2 * 8][k] = part(T{}, p.a[i], j);
        if (i % 2 == 0) b[k][l / 4] = part(T{}, p.b[i / 2], j);
      }
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      float& c = static_cast<Product*>(lanes[l])->c[i];
      double sum = c;
      for (int k = 0; k < kDepth; ++k) sum += double(a[l / 4 + i / 2 * 8][k]) * double(b[k][l % 4 * 2 + i % 2]);
      c = emulator::cut_off(sum);
    }
}
template <class T>
void mma(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product product{c, a, {b0, b1}};
  emulator::collective(&product, mma_op<T>);
}

// With errors of the size that the instructions are documented to have.
inline float disturbed(double v, float of, double size) {
  return float(v * (1 + size * (int(bits_of(of) * 2654435761u >> 16 & 0xff) - 128) / 128));
}
inline float exp2_approx(float v) { return disturbed(std::exp2(double(v)), v, 0x1p-22); }
inline float reciprocal(float v) { return disturbed(1 / double(v), v, 0x1p-24); }
inline void times_or_add(float t, float& v, float e, float& sum) {
  if (t < 0)
    v *= e;
  else
    sum += t;
}

inline void hold(float&) {}
inline void hold(uint32_t&) {}
inline int fresh_thread_index() { return int(emulator::machine.current); }
inline int fresh_block_index() { return int(emulator::machine.block_index.x); }
inline void sync_warp() {
  emulator::collective(nullptr, [](void**) {});
}
inline bool any_of_warp(bool v) {
  emulator::collective(&v, [](void** lanes) {
    bool any = false;
    for (int l = 0; l < 32; ++l) any |= *static_cast<bool*>(lanes[l]);
    for (int l = 0; l < 32; ++l) *static_cast<bool*>(lanes[l]) = any;
  });
  return v;
}
template <typename T>
T shuffle_xor(T v, int mask) {
  static_assert(sizeof(T) <= 8);
  T from[1] = {v};
  struct Exchange {
    T in, out;
    int mask;
  } exchange{from[0], v, mask};
  emulator::collective(&exchange, [](void** lanes) {
    for (int l = 0; l < 32; ++l) {
      Exchange& e = *static_cast<Exchange*>(lanes[l]);
      e.out = static_cast<Exchange*>(lanes[l ^ e.mask])->in;
    }
  });
  return exchange.out;
}
template <typename T>
T load_fresh(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) emulator::fail("a misaligned load");
  return *p;
}

}  // namespace mio_ext
