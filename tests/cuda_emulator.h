// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/cuda/ on the CPU, thread by thread, so that their values can be tested without a GPU.
// mma.cuh includes it in place of its PTX.
//
// What a test wants to see is made worse than on a GPU: shared memory starts as NaN, a cp.async turns its target
// into NaN and only delivers at the wait, a warp runs from barrier to barrier before the next one starts, in
// random order, blocks come in random order, and sums in the tensor cores are cut off. Misaligned and
// conflicting accesses to shared memory end the program, as do collectives that not all lanes of a warp reach.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define MIO_DEVICE inline

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::printf("emulator: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

// Memory with an unmapped page on either side, full of NaN; accesses past its end are faults at once.
class Guarded {
 public:
  explicit Guarded(size_t bytes, size_t alignment = 16) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    map_ =
        static_cast<unsigned char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED) fail("no memory");
    std::memset(map_, 0xff, mapped_);
    mprotect(map_, page, PROT_NONE);
    mprotect(map_ + mapped_ - page, page, PROT_NONE);
    first_ = map_ + page;
    data_ = first_ + (inside - bytes) / alignment * alignment;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    for (const unsigned char* p = first_; p < data_; ++p)
      if (*p != 0xff) fail("a write before the start of a buffer");
    munmap(map_, mapped_);
  }
  void* data() const { return data_; }

 private:
  unsigned char *map_, *first_, *data_;
  size_t mapped_;
};

struct Copy {
  uint32_t to;
  const void* from;
};

enum class State { kReady, kInWarp, kAtBarrier, kAtGrid, kDone };

struct Thread {
  State state = State::kReady;
  bool started = false;
  jmp_buf resume;
  std::vector<std::vector<Copy>> groups{1};  // of cp.async, oldest first; the last is open
};

struct Warp {
  int arrived = 0;
  void* arguments[32];
  void (*op)(void**) = nullptr;
};

struct Block {
  static constexpr size_t kStackBytes = 256 * 1024;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::unique_ptr<Guarded> memory;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  dim3 block_index;

  Block() = default;
  Block(unsigned n, size_t bytes, dim3 index)
      : threads(n),
        warps(n / 32),
        memory(new Guarded(bytes, 128)),
        shared(static_cast<unsigned char*>(memory->data())),
        shared_bytes(bytes),
        block_index(index) {
    for (unsigned t = 0; t < n; ++t) stacks.emplace_back(new char[kStackBytes]);
  }
};

// The block that runs, and what all share.
struct Machine : Block {
  std::mt19937 random{1};
  dim3 grid;
  unsigned current = 0;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  std::function<void()> body;
};
inline Machine machine;
inline Thread& self() { return machine.threads[machine.current]; }

// The loop below makes the fiber run until it waits for others.
inline void wait_as(State state) {
  self().state = state;
  if (_setjmp(self().resume) == 0) _longjmp(machine.scheduler, 1);
}

inline void fiber() {
  machine.body();
  self().state = State::kDone;
  _longjmp(machine.scheduler, 1);
}

inline void start_or_resume(unsigned t) {
  machine.current = t;
  if (_setjmp(machine.scheduler) != 0) return;
  if (self().started) _longjmp(self().resume, 1);
  self().started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = machine.stacks[t].get();
  context.uc_stack.ss_size = Block::kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber, 0);
  setcontext(&context);
}

inline void run_warp(unsigned warp) {
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned t = 32 * warp; t < 32 * warp + 32; ++t)
      if (machine.threads[t].state == State::kReady) {
        progress = true;
        start_or_resume(t);
      }
  }
  if (machine.warps[warp].arrived) fail("a warp's collective was not reached by all its lanes");
}

// Runs a block to its end, or to where it waits for the grid: true.
inline bool run_block(Block& block) {
  std::swap(static_cast<Block&>(machine), block);
  std::vector<unsigned> order(machine.warps.size());
  for (unsigned w = 0; w < order.size(); ++w) order[w] = w;
  bool at_grid = false;
  for (Thread& thread : machine.threads)
    if (thread.state == State::kAtGrid) thread.state = State::kReady;
  for (bool running = true; running;) {
    std::shuffle(order.begin(), order.end(), machine.random);
    for (unsigned warp : order) run_warp(warp);
    running = false;
    for (Thread& thread : machine.threads) {
      if (thread.state == State::kAtGrid) at_grid = true;
      if (thread.state == State::kAtBarrier) thread.state = State::kReady, running = true;
    }
    if (running && at_grid) fail("threads of a block at different barriers");
  }
  std::swap(static_cast<Block&>(machine), block);
  return at_grid;
}

// Every lane brings its arguments; the last to come carries the instruction out for all.
inline void collective(void* arguments, void (*op)(void**)) {
  Warp& warp = machine.warps[machine.current / 32];
  if (warp.arrived && warp.op != op) fail("the lanes of a warp are at different instructions");
  warp.op = op;
  warp.arguments[machine.current % 32] = arguments;
  if (++warp.arrived < 32) return wait_as(State::kInWarp);
  warp.arrived = 0;
  op(warp.arguments);
  const unsigned first = machine.current / 32 * 32;
  for (unsigned t = first; t < first + 32; ++t) machine.threads[t].state = State::kReady;
}

inline unsigned char* at_shared(uint32_t address, uint32_t bytes) {
  if (address % bytes != 0) fail("a misaligned address in shared memory");
  if (address + bytes > machine.shared_bytes) fail("past the end of shared memory");
  return machine.shared + address;
}

// float32 from a sum in double, cut off as the tensor cores do.
inline float cut_off(double v) {
  const float r = float(v);
  return std::abs(double(r)) > std::abs(v) ? std::nextafter(r, 0.0f) : r;
}

}  // namespace emulator

#define threadIdx (dim3{emulator::machine.current, 0, 0})
#define blockIdx (emulator::machine.block_index)
#define blockDim (dim3{unsigned(emulator::machine.threads.size()), 1, 1})
#define gridDim (emulator::machine.grid)

inline void __syncthreads() { emulator::wait_as(emulator::State::kAtBarrier); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* p, unsigned v) { return (*p += v) - v; }

namespace mio_ext {

// together: blocks may wait for each other.
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, void*, const Params& params,
            bool together = false) {
  emulator::Machine& m = emulator::machine;
  m.grid = grid;
  m.body = [&] { kernel(params); };
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  auto block = [&](unsigned i) {
    const dim3 index{i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    return std::make_unique<emulator::Block>(unsigned(threads), size_t(shared_bytes), index);
  };
  std::vector<std::unique_ptr<emulator::Block>> waiting(order.size());
  for (size_t left = order.size(); left > 0;) {
    std::shuffle(order.begin(), order.end(), m.random);
    for (unsigned i : order) {
      if (!waiting[i]) waiting[i] = block(i);
      if (emulator::run_block(*waiting[i])) {
        if (!together) emulator::fail("a barrier of the grid in an ordinary launch");
        continue;
      }
      waiting[i].reset();
      --left;
    }
    order.clear();
    for (unsigned i = 0; i < waiting.size(); ++i)
      if (waiting[i]) order.push_back(i);
    if (order.size() != left) emulator::fail("not all blocks are at the grid's barrier");
  }
}

inline uint32_t bits_of(float v) {
  uint32_t r;
  std::memcpy(&r, &v, 4);
  return r;
}
inline float float_of(uint32_t v) {
  float r;
  std::memcpy(&r, &v, 4);
  return r;
}

inline void sync_grid() { emulator::wait_as(emulator::State::kAtGrid); }

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
inline uint32_t load_shared(uint32_t address) {
  emulator::collective(&address, check_banks_op);
  uint32_t v;
  std::memcpy(&v, emulator::at_shared(address, 4), 4);
  return v;
}
inline float2 load_shared_pair(uint32_t address) {
  float2 v;
  std::memcpy(&v, emulator::at_shared(address, 8), 8);
  return v;
}

inline void cp_async(uint32_t to, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::fail("cp.async from a misaligned address");
  std::memset(emulator::at_shared(to, 16), 0xff, 16);
  emulator::self().groups.back().push_back({to, from});
}
inline void cp_async_commit() { emulator::self().groups.emplace_back(); }
template <int kOpenGroups>
void cp_async_wait() {
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

inline void sync_warp() {
  emulator::collective(nullptr, [](void**) {});
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
  return *p;
}

}  // namespace mio_ext
