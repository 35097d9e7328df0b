// SPDX-License-Identifier: Apache-2.0
// The shapes of csrc/cuda/tile.h as a table, for cuda_resources.py.
#include <cstdio>

#include "cuda/tile.h"

namespace {

using namespace mio_ext;

template <class T>
void print(const char* sweep, const char* arithmetic, int threads) {
  std::printf("%s %s D<=%d|%d|%d|%d|1\n", sweep, arithmetic, T::kWidth, threads, T::kSharedBytes,
              T::kBlockM * T::kBlockN / T::kThreads);
}

// Its code has the terms of half a tile at a time.
void print_logits(const char* arithmetic) {
  using T = WideTile;
  std::printf("logits %s|%d|%d|%d|2\n", arithmetic, T::kThreads + T::kProducerThreads, T::kSharedBytes,
              T::kBlockM * T::kBlockN / T::kThreads / 2);
}

// Of a row fragment at a time.
void print_portable_logits(const char* arithmetic) {
  using T = PortableWideTile;
  std::printf("wide %s|%d|%d|%d|2\n", arithmetic, T::kThreads, T::kSharedBytes,
              T::kBlockM * T::kBlockN / T::kThreads / 2);
}

template <class A>
void print_portable(const char* arithmetic) {
  print<Tile<A, 64>>("sweep", arithmetic, Tile<A, 64>::kThreads);
  print<Tile<A, 128>>("sweep", arithmetic, Tile<A, 128>::kThreads);
  print<Tile<A, 256>>("sweep", arithmetic, Tile<A, 256>::kThreads);
}

template <class T>
void print_hopper(const char* arithmetic) {
  print<T>("hopper", arithmetic, T::kThreads + T::kProducerThreads);
}

}  // namespace

// kernel|threads of a block|bytes of shared memory|logits that a thread has at a time|times for a tile
int main() {
  print_portable<Bf16>("Bf16");
  print_portable<Fp16>("Fp16");
  print_portable<Tf32>("Tf32");
  print_portable<Fp16x3>("Fp16x3");
  print_hopper<HopperTile<Bf16, 64>>("Bf16");
  print_hopper<HopperTile<Bf16, 128>>("Bf16");
  print_hopper<HopperTile<Bf16, 256>>("Bf16");
  print_hopper<HopperTile<Fp16, 64>>("Fp16");
  print_hopper<HopperTile<Fp16, 128>>("Fp16");
  print_hopper<HopperTile<Fp16, 256>>("Fp16");
  print_logits("Bf16");
  print_logits("Fp16");
  print_portable_logits("Bf16");
  print_portable_logits("Fp16");
}
