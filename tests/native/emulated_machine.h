// SPDX-License-Identifier: Apache-2.0
// A machine that runs CUDA kernels on the CPU, thread by thread: blocks, warps, barriers and memory. Its instructions
// are in cuda_emulator.h and hopper_emulator.h.
//
// What a test wants to see is made worse than on a GPU: shared memory starts as NaN, a warp runs from barrier to
// barrier before the next one starts, in random order, and blocks come in random order, those of a cluster by turns.
// Misaligned accesses to shared memory end the program, as do collectives that not all lanes of a warp reach, threads
// that wait for each other for ever, what is sent to a block of the cluster that has left, and copies, products and
// arrivals that a block leaves behind.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "left_out.h"

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
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
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

enum class State { kReady, kInWarp, kPolling, kAtBarrier, kAtCluster, kAtGrid, kDone };

struct Thread {
  State state = State::kReady;
  bool started = false;
  jmp_buf resume;
  std::vector<std::vector<Copy>> groups{1};  // of cp.async, oldest first; the last is open
};

struct Warp {
  int arrived = 0;
  int64_t arrivals = 0;  // ever
  void* arguments[32];
  void (*op)(void**) = nullptr;
  std::vector<std::vector<std::function<void()>>> groups{1};  // of wgmma, as a Thread's
  struct Accumulator {
    std::vector<float> value;  // what the products that are done have made of it
    int open = 0;              // products under way that write there
  };
  std::map<const void*, Accumulator> busy;  // the registers there are NaN until the wait for the last of them
  bool fenced = false;
  int asleep = 0;  // rounds that it sits out
};

// Phases that take arrivals and bytes; see mbarrier_init().
struct Mbarrier {
  explicit Mbarrier(uint32_t count = 1) : count(count) {}
  uint32_t count, arrivals = 0, phases = 0;
  int64_t bytes = 0;                             // announced, not yet there
  std::vector<std::function<int64_t()>> copies;  // under way: what it takes to deliver each, in bytes
  void settle() {
    if (arrivals < count || bytes != 0) return;
    arrivals = 0;
    ++phases;
  }
};

constexpr size_t kStackBytes = 256 * 1024;
using Stack = std::unique_ptr<char[]>;
inline std::vector<Stack> free_stacks;  // the kernel zeroes fresh ones page by page, which took half the time

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Stack> stacks;
  std::unique_ptr<Guarded> memory;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  dim3 block_index;
  std::map<uint32_t, Mbarrier> mbarriers;
  struct Named {
    int arrived = 0, passes = 0;
  };
  std::map<int, Named> named_barriers;
  std::vector<Block*> cluster;  // its blocks; this one's place is stale while it runs

  unsigned cluster_rank() const { return block_index.x % unsigned(cluster.size()); }
  bool any(State state) const {
    return std::any_of(threads.begin(), threads.end(), [=](const Thread& thread) { return thread.state == state; });
  }
  void release(State state) {
    for (Thread& thread : threads)
      if (thread.state == state) thread.state = State::kReady;
  }

  Block() = default;
  Block(unsigned n, size_t bytes, dim3 index)
      : threads(n),
        warps(n / 32),
        memory(new Guarded(bytes, 1024)),
        shared(static_cast<unsigned char*>(memory->data())),
        shared_bytes(bytes),
        block_index(index) {
    for (unsigned t = 0; t < n; ++t) {
      if (free_stacks.empty()) free_stacks.emplace_back(new char[kStackBytes]);
      stacks.push_back(std::move(free_stacks.back()));
      free_stacks.pop_back();
    }
  }
  Block(Block&&) = default;
  Block& operator=(Block&&) = default;
  ~Block() { std::move(stacks.begin(), stacks.end(), std::back_inserter(free_stacks)); }
};

// The block that runs, and what all share.
struct Machine : Block {
  std::mt19937 random{1};
  dim3 grid;
  unsigned current = 0;
  bool moved = false;  // since the last look, some thread has got on
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  std::function<void()> body;
};
inline Machine machine;
inline Thread& self() { return machine.threads[machine.current]; }

inline Warp& own_warp() { return machine.warps[machine.current / 32]; }

// The loop below makes the fiber run until it waits for others.
inline void wait_as(State state) {
  self().state = state;
  machine.moved |= state != State::kPolling;
  if (_setjmp(self().resume) == 0) _longjmp(machine.scheduler, 1);
}

template <class F>
void wait_until(F&& over) {
  while (!over()) wait_as(State::kPolling);
  machine.moved = true;
}

// Lets the block's other warps run first.
inline void pause() {
  machine.moved = true;
  wait_as(State::kPolling);
}

inline void fiber() {
  machine.body();
  self().state = State::kDone;
  machine.moved = true;
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
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber, 0);
  setcontext(&context);
}

inline void run_warp(unsigned warp) {
  Warp& its = machine.warps[warp];
  int64_t seen = its.arrivals;
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned t = 32 * warp; t < 32 * warp + 32; ++t)
      if (machine.threads[t].state == State::kReady) {
        progress = true;
        start_or_resume(t);
      }
    // Some lanes may be past a wait that others have yet to see is over.
    if (!progress && its.arrived && its.arrivals > seen) {
      seen = its.arrivals;
      for (unsigned t = 32 * warp; t < 32 * warp + 32; ++t)
        if (machine.threads[t].state == State::kPolling) machine.threads[t].state = State::kReady, progress = true;
    }
  }
  if (its.arrived) fail("a warp's collective was not reached by all its lanes");
}

// Some warps fall far behind the others.
inline bool sits_out(unsigned warp) {
  int& asleep = machine.warps[warp].asleep;
  if (asleep == 0 && machine.random() % 32 == 0) asleep = int(machine.random() % 32);
  return asleep > 0 && asleep-- > 0;
}

// Runs a block's warps, each to where it waits; whether there is more to run before the others of its cluster get on.
inline bool run_block(Block& block) {
  std::swap(static_cast<Block&>(machine), block);
  std::vector<unsigned> order(machine.warps.size());
  for (unsigned w = 0; w < order.size(); ++w) order[w] = w;
  std::shuffle(order.begin(), order.end(), machine.random);
  for (unsigned warp : order) sits_out(warp) ? void(machine.moved = true) : run_warp(warp);
  bool running = machine.any(State::kPolling) || machine.any(State::kReady);
  machine.release(State::kPolling);
  if (!running && machine.any(State::kAtBarrier)) {
    if (machine.any(State::kAtGrid) || machine.any(State::kAtCluster)) fail("threads of a block at different barriers");
    machine.release(State::kAtBarrier);
    running = true;
  }
  std::swap(static_cast<Block&>(machine), block);
  return running;
}

// What a block that is done has under way would go astray.
inline void check_end(const Block& block) {
  for (const auto& [barrier, its] : block.mbarriers)
    if (!its.copies.empty() || its.bytes != 0) fail("a copy that nobody waited for");
  for (const auto& [barrier, its] : block.named_barriers)
    if (its.arrived != 0) fail("a barrier that not all came to");
  for (const Warp& warp : block.warps)
    if (warp.groups.size() > 1 || !warp.groups.back().empty() || !warp.busy.empty())
      fail("a product that nobody waited for");
  for (const Thread& thread : block.threads)
    for (const auto& group : thread.groups)
      if (!group.empty()) fail("a cp.async that nobody waited for");
}

// Runs the blocks of a cluster to their end, or to where they wait for the grid: true.
inline bool run_cluster(std::vector<Block*> blocks) {
  for (Block* block : blocks) block->release(State::kAtGrid);
  auto any = [&](State state) {
    return std::any_of(blocks.begin(), blocks.end(), [=](const Block* block) { return block->any(state); });
  };
  for (bool running = true; running;) {
    std::shuffle(blocks.begin(), blocks.end(), machine.random);
    machine.moved = false;
    running = false;
    for (Block* block : blocks) running = run_block(*block) || running;
    if (running && !machine.moved) fail("threads wait for each other for ever");
    if (running || !any(State::kAtCluster)) continue;
    if (any(State::kAtGrid)) fail("threads of a cluster at different barriers");
    for (Block* block : blocks) block->release(State::kAtCluster);
    running = true;
  }
  if (any(State::kAtGrid)) return true;
  for (const Block* block : blocks) check_end(*block);
  return false;
}

// A block of the running one's cluster.
inline Block& of_cluster(unsigned rank) {
  if (rank == machine.cluster_rank()) return machine;
  if (rank >= machine.cluster.size()) fail("a block that the cluster has not");
  Block& block = *machine.cluster[rank];
  if (std::all_of(block.threads.begin(), block.threads.end(), [](const Thread& t) { return t.state == State::kDone; }))
    fail("a block of the cluster that has left");
  return block;
}

// Every lane brings its arguments; the last to come carries the instruction out for all.
inline void collective(void* arguments, void (*op)(void**)) {
  Warp& warp = machine.warps[machine.current / 32];
  if (warp.arrived && warp.op != op) fail("the lanes of a warp are at different instructions");
  warp.op = op;
  warp.arguments[machine.current % 32] = arguments;
  ++warp.arrivals;
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

}  // namespace emulator

#define threadIdx (dim3{emulator::machine.current, 0, 0})
#define blockIdx (emulator::machine.block_index)
#define blockDim (dim3{unsigned(emulator::machine.threads.size()), 1, 1})
#define gridDim (emulator::machine.grid)

inline void __syncthreads(MIO_PLACE) {
  MIO_MAY_BE_LEFT_OUT;
  emulator::wait_as(emulator::State::kAtBarrier);
}
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* p, unsigned v) { return (*p += v) - v; }

namespace mio_ext {

// together: blocks may wait for each other. cluster: so many along x are one.
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, void*, const Params& params,
            bool together = false, int cluster = 1) {
  emulator::Machine& m = emulator::machine;
  m.grid = grid;
  m.body = [&] { kernel(params); };
  const unsigned each = unsigned(cluster);
  if (grid.x % each != 0) emulator::fail("a grid that clusters do not fill");
  std::vector<unsigned> order(grid.x * grid.y * grid.z / each);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  using Cluster = std::vector<std::unique_ptr<emulator::Block>>;
  auto start = [&](unsigned first) {
    Cluster blocks;
    for (unsigned i = first; i < first + each; ++i) {
      const dim3 index{i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      blocks.push_back(std::make_unique<emulator::Block>(unsigned(threads), size_t(shared_bytes), index));
    }
    return blocks;
  };
  std::vector<Cluster> waiting(order.size());
  for (size_t left = order.size(); left > 0;) {
    std::shuffle(order.begin(), order.end(), m.random);
    for (unsigned i : order) {
      if (waiting[i].empty()) waiting[i] = start(i * each);
      std::vector<emulator::Block*> blocks;
      for (const auto& block : waiting[i]) blocks.push_back(block.get());
      for (emulator::Block* block : blocks) block->cluster = blocks;
      if (emulator::run_cluster(blocks)) {
        if (!together) emulator::fail("a barrier of the grid in an ordinary launch");
        continue;
      }
      waiting[i].clear();
      --left;
    }
    order.clear();
    for (unsigned i = 0; i < waiting.size(); ++i)
      if (!waiting[i].empty()) order.push_back(i);
    if (order.size() != left) emulator::fail("not all blocks are at the grid's barrier");
  }
}

}  // namespace mio_ext
