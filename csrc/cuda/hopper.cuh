// SPDX-License-Identifier: Apache-2.0
// The instructions of compute capability 9.0 that mma.cuh has not, one thin wrapper each: matrix products by four warps
// at a time from shared memory, copies that an mbarrier counts, and barriers of some of a block's warps. Compiled by a
// C++ compiler they are tests/native/hopper_emulator.h.
#pragma once

#include "../pairwise_bce.h"
#include "mma.cuh"

namespace mio_ext {

// A matrix of 16-bit numbers in shared memory, as wgmma() takes it, from `address` on: rows of 128 bytes one after the
// other, in which the 16-byte chunk c of row r lies at c ^ (r % 8); row 0 begins at a multiple of 1024. next_block: how
// many bytes on the next 64 columns begin, where rows are what a product sums over.
struct Descriptor {
  uint32_t place;
  MIO_DEVICE explicit Descriptor(uint32_t address, uint32_t next_block = 16)
      : place(next_block / 16 << 16 | (address / 16 & 0x3fff)) {}
  MIO_DEVICE Descriptor operator+(uint32_t bytes) const {
    Descriptor moved = *this;
    moved.place += bytes / 16;
    return moved;
  }
  MIO_DEVICE uint64_t bits() const {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32;
    return kSwizzle128 | kEightRows | place;
  }
};

}  // namespace mio_ext

#if defined(__CUDACC__)
namespace mio_ext {

// ---------------------------------------------------------------- matrix products

// Products read and write what they are given until wgmma_wait(). The fence comes before the first, after registers
// that they use have been written.
MIO_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MIO_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kOpenGroups of the committed ones, the youngest, are under way.
template <int kOpenGroups>
MIO_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpenGroups) : "memory");
}

#define MIO_C4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define MIO_C16(i) MIO_C4(i), MIO_C4(i + 1), MIO_C4(i + 2), MIO_C4(i + 3)
#define MIO_C32(i) MIO_C16(i), MIO_C16(i + 4)
#define MIO_C64(i) MIO_C32(i), MIO_C32(i + 8)
#define MIO_N32                                                                                   \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25" \
  ",%26,%27,%28,%29,%30,%31"
#define MIO_N64                                                                                      \
  MIO_N32                                                                                            \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55" \
  ",%56,%57,%58,%59,%60,%61,%62,%63"
#define MIO_N128                                                                                         \
  MIO_N64                                                                                                \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88" \
  ",%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110"  \
  ",%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// c [64, N] = a [64, 16] b^T, or c += it: both in shared memory. c lies as four warps' accumulators of mma() do, one
// below the other.
#define MIO_WGMMA_SHARED(Type, type, n, names, a_name, b_name, add_name, ...)                                        \
  MIO_DEVICE void wgmma(Type, float (&c)[n / 8][4], Descriptor a, Descriptor b, bool add) {                          \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " add_name                                                           \
                 ", 0;\n"                                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, " a_name ", " b_name \
                 ", p, 1, 1, 0, 0;}"                                                                                 \
                 : __VA_ARGS__                                                                                       \
                 : "l"(a.bits()), "l"(b.bits()), "r"(int(add)));                                                     \
  }
// c [64, N] += a [64, 16] b: a lies as mma()'s does, b [16, N] in shared memory.
#define MIO_WGMMA_REGISTERS(Type, type, n, names, a_names, b_name, ...)                                        \
  MIO_DEVICE void wgmma(Type, float (&c)[n / 8][4], const uint32_t (&a)[4], Descriptor b) {                    \
    asm volatile(                                                                                              \
        "{.reg .pred p; setp.eq.b32 p, 0, 0;\n"                                                                \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, {" a_names "}, " b_name \
        ", p, 1, 1, 1;}"                                                                                       \
        : __VA_ARGS__                                                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()));                                          \
  }
#define MIO_WGMMA(Type, type)                                                                  \
  MIO_WGMMA_SHARED(Type, type, 64, MIO_N32, "%32", "%33", "%34", MIO_C32(0))                   \
  MIO_WGMMA_SHARED(Type, type, 128, MIO_N64, "%64", "%65", "%66", MIO_C32(0), MIO_C32(8))      \
  MIO_WGMMA_SHARED(Type, type, 256, MIO_N128, "%128", "%129", "%130", MIO_C64(0), MIO_C64(16)) \
  MIO_WGMMA_REGISTERS(Type, type, 64, MIO_N32, "%32,%33,%34,%35", "%36", MIO_C32(0))           \
  MIO_WGMMA_REGISTERS(Type, type, 128, MIO_N64, "%64,%65,%66,%67", "%68", MIO_C32(0), MIO_C32(8))
MIO_WGMMA(Bfloat16, "bf16")
MIO_WGMMA(Float16, "f16")
#undef MIO_WGMMA
#undef MIO_WGMMA_REGISTERS
#undef MIO_WGMMA_SHARED
#undef MIO_N128
#undef MIO_N64
#undef MIO_N32
#undef MIO_C64
#undef MIO_C32
#undef MIO_C16
#undef MIO_C4

// ---------------------------------------------------------------- barriers and copies

// An mbarrier, 8 bytes of shared memory, goes from phase to phase: each takes `count` arrivals and the bytes that were
// announced.
MIO_DEVICE void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Before the block's threads and the copies may use what was initialised.
MIO_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
MIO_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
MIO_DEVICE void mbarrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity is over; the one before the first counts as over, with parity 1.
MIO_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  do
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  while (!over);
}
// At the barrier of this place in another block of the cluster, or in this one. It orders no memory there but what this
// thread knows to be done: a release for the cluster would wait for all that it has written.
MIO_DEVICE void mbarrier_arrive_at(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier),
      "r"(block)
      : "memory");
}
// Bytes from global to shared memory, multiples of 16 all; the barrier counts them.
MIO_DEVICE void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// The same, to the same place of each block of the cluster whose bit is set; there the barrier of the same place
// counts.
MIO_DEVICE void bulk_copy_to(uint16_t blocks, uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(blocks)
      : "memory");
}

// All threads of a cluster that have not left.
MIO_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Barriers 1 to 15, of as many threads as are named; arriving is not waiting.
MIO_DEVICE void barrier_wait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
MIO_DEVICE void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Four warps' share of the registers, in threads'.
template <int kRegisters>
MIO_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
MIO_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
MIO_DEVICE void trap() { asm volatile("trap;"); }
// What all threads of a warp have the same of, and the compiler then knows it.
MIO_DEVICE int uniform(int v) { return __shfl_sync(~0u, v, 0); }

}  // namespace mio_ext
#else
#include "hopper_emulator.h"
#endif
