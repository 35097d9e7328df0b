// SPDX-License-Identifier: Apache-2.0
// Kernel launches of one arithmetic. A .cu file instantiates them, so that the four compile apart.
#pragma once

#include <type_traits>

#include "chunked.cuh"
#include "launch.h"
#include "sweep.cuh"

namespace mio_ext {

#if defined(__CUDACC__)
// together: all blocks run at a time, and may wait for each other. cluster: so many blocks along x are one.
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, Stream stream, const Params& params,
            bool together = false, int cluster = 1) {
  if (shared_bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = together;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = unsigned(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes, config.numAttrs = cluster > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, params);
}
#endif

template <class A>
struct Launch {
  static void prepare(const Prepare& in, Stream stream);
  // Finds the plan, launches; prepares first, if in.prepares. in.rows.n, in.cols.n and in.d decide; partial parts go to
  // `scratch`, if there are any.
  static void sweep(Sweep in, int width, int multiprocessors, float* scratch, Stream stream);
};

// The sweep for compute capability 9.0; instantiated in instantiate/hopper.cu.
template <class A>
struct LaunchHopper {
  static void sweep(Sweep in, int width, int multiprocessors, float* scratch, Stream stream);
};

// Of the chunked path; instantiated in instantiate/chunked.cu.
template <class A>
struct LaunchChunked {
  static void prepare(const Prepare& in, Stream stream);
  static void project(const ChunkProjection& in, Stream stream);
};

// For float32, of products by a library.
struct LaunchChunkedTerms {
  static void terms(const ChunkTerms& in, Stream stream);
};

struct ChunkLogits;
// Its products and terms in one, for features of 16 bits; instantiated in instantiate/chunked_logits.cu.
template <class A>
struct LaunchChunkedLogits {
  static void logits(const ChunkLogits& in, Stream stream);
};
// The same for compute capability 9.0; instantiated in instantiate/chunked_hopper.cu.
template <class A>
struct LaunchChunkedHopper {
  static void logits(const ChunkLogits& in, int blocks, Stream stream);
};

// Calls f with the width and whether there are ids as types, which the kernels are made for.
template <class F>
void with_width(int width, bool ids, F&& f) {
  auto with = [&](auto w) { ids ? f(w, std::true_type()) : f(w, std::false_type()); };
  if (width == 64) with(std::integral_constant<int, 64>());
  if (width == 128) with(std::integral_constant<int, 128>());
  if (width == 256) with(std::integral_constant<int, 256>());
}

// Launches a sweep of tiles T in the blocks of a plan.
template <class T>
void launch_planned(void (*kernel)(Sweep), int threads, int slices, const Plan& plan, bool together, Sweep in,
                    float* scratch, Stream stream) {
  in.together = together;
  in.splits = plan.splits;
  in.tiles_per_split = plan.tiles_per_split;
  in.partial = plan.splits > 1 ? scratch : in.grad;
  launch(kernel, dim3(plan.row_blocks, plan.splits, slices), threads, T::kSharedBytes, stream, in, together);
}

template <class A, int kLanes>
void launch_prepare(const Prepare& in, Stream stream) {
  const int rows = in.sides == 1 || in.out[0].n_pad > in.out[1].n_pad ? in.out[0].n_pad : in.out[1].n_pad;
  const int threads = 32 * kPrepareWarps;
  launch(prepare_kernel<A, kLanes>, dim3(rows / (threads / kLanes), in.sides), threads, 0, stream, in);
}

template <class A>
void Launch<A>::prepare(const Prepare& in, Stream stream) {
  launch_prepare<A, kRowLanes>(in, stream);
}

template <class A>
void Launch<A>::sweep(Sweep in, int width, int multiprocessors, float* scratch, Stream stream) {
  with_width(width, in.rows.ids, [&](auto w, auto ids) {
    using T = Tile<A, w()>;
    const int slices = in.grad ? T::kSlices : 1;
    // One block a multiprocessor is there for certain, whatever else it needs.
    const int together_blocks = multiprocessors / slices;
    const bool together =
        in.rows.n <= kTogetherRows && in.cols.n <= kTogetherRows && ceil_div(in.rows.n, T::kBlockM) <= together_blocks;
    if (in.prepares && !together) {
      prepare(in.prepare, stream);
      in.prepares = false;
    }
    const int slots = together ? together_blocks : multiprocessors * T::kBlocksPerMultiprocessor / slices;
    const Plan plan =
        plan_sweep(in.rows.n, in.cols.n, in.d, T::kBlockM, T::kBlockN, slots, together ? slots : 2 * slots, together);
    launch_planned<T>(sweep_kernel<A, w(), ids()>, T::kThreads, slices, plan, together, in, scratch, stream);
  });
}

}  // namespace mio_ext
