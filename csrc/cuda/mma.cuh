// SPDX-License-Identifier: Apache-2.0
// The few instructions the kernels are made of, one thin wrapper each. Compiled by nvcc they are PTX;
// compiled by a C++ compiler they are tests/native/cuda_emulator.h, which runs the same kernels on the CPU.
//
// Shared memory is addressed by 32-bit numbers, as the instructions do.
#pragma once

#include <cstdint>

namespace mio_ext {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace mio_ext

#if defined(__CUDACC__)
#include <cooperative_groups.h>

#define MIO_DEVICE __device__ __forceinline__

namespace mio_ext {

MIO_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}
MIO_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8 x 16 byte matrices; lane l gives the address of row l % 8 of matrix l / 8 and gets, of each matrix,
// the 4 bytes at 4 (l % 4) of row l / 4. With trans, 2-byte elements: rows 2 (l % 4), + 1 of column l / 4.
MIO_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
MIO_DEVICE void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
MIO_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
MIO_DEVICE float2 load_shared_pair(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
MIO_DEVICE float4 load_shared_four(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
MIO_DEVICE uint2 load_shared_words(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

// 16 bytes from global to shared memory, there once cp_async_wait<n>() leaves at most n younger groups open.
MIO_DEVICE void cp_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
MIO_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kOpenGroups>
MIO_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpenGroups) : "memory");
}

// c [16, 8] += a [16, k] b [k, 8]. With g = lane / 4 and q = lane % 4, 16 bits, k = 16: a holds rows g, g + 8 of
// columns 2q, 2q + 1, then the same 8 columns on; b rows 2q, 2q + 1, then 8 on, of column g; c rows g (2 numbers),
// g + 8 of columns 2q, 2q + 1. TF32, k = 8: the same with one column q in place of the pair, and 4 columns on.
MIO_DEVICE void mma(Bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MIO_DEVICE void mma(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MIO_DEVICE void mma(float, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One special function each; the second operand of pack() is the upper half.
MIO_DEVICE float exp2_approx(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
MIO_DEVICE float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// t < 0: v *= e; else, and if t is NaN: sum += t. The compiler would calculate the first always, and select.
MIO_DEVICE void times_or_add(float t, float& v, float e, float& sum) {
  asm("{.reg .pred p; setp.lt.f32 p, %2, 0f00000000; @p mul.f32 %0, %0, %3; @!p add.f32 %1, %1, %2;}"
      : "+f"(v), "+f"(sum)
      : "f"(t), "f"(e));
}
MIO_DEVICE uint32_t pack(Bfloat16, float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
MIO_DEVICE uint32_t pack(Float16, float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
MIO_DEVICE float to_float(Float16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
  return r;
}
// a b, rounded: the compiler may not make it part of a sum, which would round it otherwise than the same product
// elsewhere.
MIO_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
MIO_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
MIO_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// What the compiler knows of r ends here: it may not use a product's registers before for anything else, nor what it
// has made of r.
MIO_DEVICE void hold(float& r) { asm volatile("" : "+f"(r)::"memory"); }
MIO_DEVICE void hold(uint32_t& r) { asm volatile("" : "+r"(r)::"memory"); }
// threadIdx.x and blockIdx.x, read anew: what the compiler has made of them before, it would keep in registers through
// a loop that has none to spare.
MIO_DEVICE int fresh_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
MIO_DEVICE int fresh_block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
MIO_DEVICE void sync_warp() { __syncwarp(); }
MIO_DEVICE bool any_of_warp(bool v) { return __any_sync(0xffffffffu, v); }
// All blocks of a cooperative launch.
MIO_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }
template <typename T>
MIO_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
// Past the first-level cache, which does not see what other blocks wrote.
template <typename T>
MIO_DEVICE T load_fresh(const T* p) {
  return __ldcg(p);
}

}  // namespace mio_ext
#else
#include "cuda_emulator.h"
#endif

namespace mio_ext {

MIO_DEVICE float to_float(Bfloat16 v) { return float_of(uint32_t(v.bits) << 16); }
MIO_DEVICE float to_float(float v) { return v; }

// v to the 11 significant bits of TF32, ties away from zero. The bits of a GPU's own NaN, 0x7fffffff, would become 0.
MIO_DEVICE float round_to_tf32(float v) { return v == v ? float_of((bits_of(v) + 0x1000u) & 0xffffe000u) : v; }

}  // namespace mio_ext
