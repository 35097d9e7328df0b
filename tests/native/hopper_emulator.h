// SPDX-License-Identifier: Apache-2.0
// The instructions of csrc/cuda/hopper.cuh, on the CPU. All that may happen late does: products are made at the wait,
// once all other warps have run, from what registers and shared memory hold then, and leave NaN until then; a copy
// turns its target into NaN and is delivered some time after a thread begins to wait for it.
#pragma once

namespace mio_ext {

// ---------------------------------------------------------------- matrix products

inline void wgmma_fence(MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  emulator::collective(nullptr, [](void**) { emulator::own_warp().fenced = true; });
}
inline void wgmma_commit(MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  emulator::collective(nullptr, [](void**) { emulator::own_warp().groups.emplace_back(); });
}
template <int kOpenGroups>
void wgmma_wait(MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  emulator::pause();
  emulator::collective(nullptr, [](void**) {
    auto& groups = emulator::own_warp().groups;
    if (!groups.back().empty()) emulator::fail("a wait for products that are not committed");
    for (; groups.size() > kOpenGroups + 1; groups.erase(groups.begin()))
      for (const auto& product : groups.front()) product();
    emulator::own_warp().fenced = false;
  });
}

// Number (row, column) of what a descriptor names; transposed: it sums over its rows.
template <class T>
float element_at(T type, uint64_t descriptor, int mn, int k, bool transposed) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) * 16, next_block = uint32_t(descriptor >> 16 & 0x3fff) * 16,
                 eight_rows = uint32_t(descriptor >> 32 & 0x3fff) * 16;
  if (descriptor >> 62 != 1 || start / 128 % 8 != 0) emulator::fail("a matrix that is not swizzled by 128 bytes");
  const int row = transposed ? k : mn, column = transposed ? mn : k;
  uint32_t at = start + row / 8 * eight_rows + row % 8 * 128 + column / 64 * next_block + column % 64 * 2;
  at ^= (at / 128 % 8) << 4;
  uint16_t bits;
  std::memcpy(&bits, emulator::at_shared(at, 2), 2);
  return part(type, bits, 0);
}

struct WarpProduct {
  float (*c)[4];
  const uint32_t* a;  // registers, or nullptr: in shared memory at a_matrix
  uint64_t a_matrix, b;
  bool add;
};

// A warp's part: rows 16 w to 16 w + 15 of a, with w its number among its four.
template <class T, int N>
void wgmma_op(void** lanes) {
  emulator::Warp& warp = emulator::own_warp();
  if (!warp.fenced) emulator::fail("a product without a fence");
  struct Work {
    WarpProduct lane[32];
  };
  auto work = std::make_shared<Work>();
  const int row0 = int(emulator::machine.current / 32 % 4) * 16;
  for (int l = 0; l < 32; ++l) {
    WarpProduct& p = work->lane[l] = *static_cast<WarpProduct*>(lanes[l]);
    emulator::Warp::Accumulator& to = warp.busy[p.c];
    if (to.open++ > 0) continue;
    to.value.assign(p.c[0], p.c[0] + N / 2);
    std::memset(p.c, 0xff, sizeof(float) * N / 2);
  }
  warp.groups.back().push_back([work, row0, &warp] {
    float a[16][16], b[16][N];
    const WarpProduct& one = work->lane[0];
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < N; ++n) b[k][n] = element_at(T{}, one.b, n, k, one.a != nullptr);
      for (int r = 0; one.a == nullptr && r < 16; ++r) a[r][k] = element_at(T{}, one.a_matrix, row0 + r, k, false);
    }
    for (int l = 0; one.a != nullptr && l < 32; ++l)
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) a[l / 4 + i % 2 * 8][l % 4 * 2 + j + i / 2 * 8] = part(T{}, work->lane[l].a[i], j);
    for (int l = 0; l < 32; ++l) {
      const WarpProduct& p = work->lane[l];
      if (p.b != one.b || p.a_matrix != one.a_matrix) emulator::fail("lanes with different matrices");
      emulator::Warp::Accumulator& to = warp.busy[p.c];
      for (int n = 0; n < N / 8; ++n)
        for (int i = 0; i < 4; ++i) {
          float& c = to.value[size_t(4 * n + i)];
          double sum = p.add ? c : 0;
          const int row = l / 4 + i / 2 * 8, column = 8 * n + l % 4 * 2 + i % 2;
          for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * double(b[k][column]);
          c = emulator::cut_off(sum);
        }
      if (--to.open > 0) continue;
      std::memcpy(p.c, to.value.data(), sizeof(float) * N / 2);
      warp.busy.erase(p.c);
    }
  });
}
template <class T, size_t N>
void wgmma(T, float (&c)[N][4], Descriptor a, Descriptor b, bool add) {
  WarpProduct product{c, nullptr, a.bits(), b.bits(), add};
  emulator::collective(&product, wgmma_op<T, int(N) * 8>);
}
template <class T, size_t N>
void wgmma(T, float (&c)[N][4], const uint32_t (&a)[4], Descriptor b) {
  WarpProduct product{c, a, 0, b.bits(), true};
  emulator::collective(&product, wgmma_op<T, int(N) * 8>);
}

// ---------------------------------------------------------------- barriers and copies

inline emulator::Mbarrier& mbarrier_at(uint32_t barrier, emulator::Block& block = emulator::machine) {
  emulator::at_shared(barrier, 8);
  auto found = block.mbarriers.find(barrier);
  if (found == block.mbarriers.end()) emulator::fail("an mbarrier that was not initialised");
  return found->second;
}
inline void mbarrier_init(uint32_t barrier, uint32_t count, MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  emulator::at_shared(barrier, 8);
  emulator::machine.mbarriers[barrier] = emulator::Mbarrier(count);
}
inline void mbarrier_init_fence() {}
inline void arrive(emulator::Mbarrier& b, uint32_t bytes) {
  if (++b.arrivals > b.count) emulator::fail("more arrivals at an mbarrier than it takes");
  b.bytes += bytes;
  b.settle();
}
inline void mbarrier_arrive_expecting(uint32_t barrier, uint32_t bytes, MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  arrive(mbarrier_at(barrier), bytes);
}
inline void mbarrier_arrive(uint32_t barrier, MIO_PLACE) { mbarrier_arrive_expecting(barrier, 0, place); }
inline void mbarrier_arrive_at(uint32_t barrier, uint32_t block, MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  arrive(mbarrier_at(barrier, emulator::of_cluster(block)), 0);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  emulator::wait_until([&] {
    emulator::Mbarrier& b = mbarrier_at(barrier);
    if (b.phases % 2 != parity) return true;
    emulator::machine.moved |= !b.copies.empty();
    if (!b.copies.empty() && emulator::machine.random() % 4 == 0) {
      const size_t which = emulator::machine.random() % b.copies.size();
      b.bytes -= b.copies[which]();
      b.copies.erase(b.copies.begin() + long(which));
      b.settle();
    }
    return b.phases % 2 != parity;
  });
}
// Each block gets its bytes at a time of its own.
inline void bulk_copy_to(uint16_t blocks, uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) emulator::fail("a misaligned bulk copy");
  emulator::at_shared(to, 16), emulator::at_shared(to + bytes - 16, 16);
  for (uint32_t rank = 0; blocks >> rank != 0; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    emulator::Block& block = emulator::of_cluster(rank);
    unsigned char* target = block.shared + to;
    std::memset(target, 0xff, bytes);
    mbarrier_at(barrier, block).copies.push_back([=] { return std::memcpy(target, from, bytes), int64_t(bytes); });
  }
}
inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, MIO_PLACE) {
  bulk_copy_to(uint16_t(1u << emulator::machine.cluster_rank()), to, from, bytes, barrier, place);
}
inline void sync_cluster(MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  emulator::wait_as(emulator::State::kAtCluster);
}

inline void barrier_arrive(int barrier, int threads, MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  auto& named = emulator::machine.named_barriers[barrier];
  if (++named.arrived == threads) named.arrived = 0, ++named.passes;
}
inline void barrier_wait(int barrier, int threads, MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  auto& named = emulator::machine.named_barriers[barrier];
  const int passes = named.passes;
  barrier_arrive(barrier, threads, place);
  emulator::wait_until([&] { return named.passes != passes; });
}

template <int kRegisters>
void fewer_registers() {}
template <int kRegisters>
void more_registers() {}
inline void trap() { emulator::fail("a trap"); }
inline int uniform(int v) { return v; }

}  // namespace mio_ext
