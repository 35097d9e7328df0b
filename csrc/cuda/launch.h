// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' face, free of torch: the problem, what its kernels hand each other, and the launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../pairwise_bce.h"

#if defined(__CUDACC__) || defined(MIO_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace mio_ext {

#if defined(__CUDACC__) || defined(CUDART_VERSION)
using Stream = cudaStream_t;
#else
using Stream = void*;  // the emulator has one
#endif

// How the fused kernels' tensor cores take the features: as they are, or float32 as a TF32 number or the sum of two
// float16. kFp32: the chunked path only, where a library multiplies.
enum class Arithmetic { kBf16, kFp16, kTf32, kFp16x3, kFp32 };

// Features as they come: row i, column f at data + i row_stride + f col_stride.
struct Features {
  const void* data;
  int64_t row_stride, col_stride;
};

// One call of the op; csrc/ops.cpp says what its fields mean. All memory is the device's.
struct PairwiseBCECuda {
  Arithmetic arithmetic;
  Features x;            // [M, D], or the first of its rows
  Features x2;           // the others
  int x_rows;            // how many are in x; M: all
  Features y;            // [K, D]; data = nullptr: y = x, and dx holds both roles' gradient
  const int64_t* x_ids;  // [M] or nullptr
  const int64_t* y_ids;  // [K]
  int m, k, d;
  int shift, offset;
  bool exclude_self, normalize;
  const float* params;  // [6], read on the device; nullptr: `constants`
  LossParams constants;
  float* loss;     // []
  double* stats;   // [8]
  float* dx;       // [M, D], contiguous; nullptr: not wanted
  float* dy;       // [K, D]
  float* dparams;  // [6]
  int multiprocessors;
  // The kernel for compute capability 9.0, where there is one: for 16-bit features, and if these are few, a gradient.
  // It takes a build for 9.0a, hopper_is_built().
  bool hopper;
  // Chunked, with that kernel: a library multiplies by the features as they come, and no dense copy is made of them.
  bool x_direct, y_direct;
  int most_chunk_rows;  // at least kChunkMultiple
  void* workspace;      // workspace_bytes(), aligned to 256
};

// Up to this many features all is done in one kernel for each gradient.
constexpr int kMaxFusedFeatures = 256;
// Up to this many rows and columns a sweep also prepares them, in a cooperative launch.
constexpr int kTogetherRows = 1024;
// Row and column numbers, and their sums, are 32-bit.
constexpr int64_t kMaxRows = 1 << 29;

inline bool is_fused(const PairwiseBCECuda& problem) {
  return problem.arithmetic != Arithmetic::kFp32 && problem.d <= kMaxFusedFeatures;
}

inline bool is_half(const PairwiseBCECuda& problem) {
  return problem.arithmetic == Arithmetic::kBf16 || problem.arithmetic == Arithmetic::kFp16;
}
// Whether the chunked path makes logits and G in one kernel.
inline bool has_chunked_logits(const PairwiseBCECuda& problem) { return is_half(problem) && !is_fused(problem); }
// Whether that is chunk_hopper_kernel.
inline bool is_chunked_hopper(const PairwiseBCECuda& problem) { return problem.hopper && has_chunked_logits(problem); }

bool hopper_is_built();

size_t workspace_bytes(const PairwiseBCECuda& problem);

// Two launches, or one for up to kTogetherRows rows and columns; another one if dy is wanted. Same inputs, same bits.
// Nothing waits for the device.
void launch_pairwise_bce(const PairwiseBCECuda& problem, Stream stream);

// The chunked path, for all else. A call is prepare; for every chunk of rows, products of the copies x and y by a
// library and terms, or logits, which are both; and the gradients of the copies, made of G by a library; project.
struct ChunkedCopies {
  size_t x, y;  // where they begin in the workspace: [m_pad, width] and [k_pad, width] of the features' type
  int m_pad, k_pad, width;
};
constexpr int kChunkMultiple = 256;  // of rows
ChunkedCopies chunked_copies(const PairwiseBCECuda& problem);
// Rows of a chunk, a multiple of that.
int chunk_rows(const PairwiseBCECuda& problem);
void launch_chunked_prepare(const PairwiseBCECuda& problem, Stream stream);
// If has_chunked_logits(): G of rows row0 to row0 + n - 1 in the features' type, [n up to kChunkMultiple, k_pad];
// nullptr: not wanted.
void launch_chunked_logits(const PairwiseBCECuda& problem, void* g, int row0, int n, Stream stream);
// Else products [n, k_pad] of rows row0 to row0 + n - 1 become G. dx [M, D] is then G times y, and dy [K, D] its
// transpose times x, summed over chunks.
void launch_chunked_terms(const PairwiseBCECuda& problem, float* products, int row0, int n, Stream stream);
void launch_chunked_project(const PairwiseBCECuda& problem, Stream stream);

}  // namespace mio_ext
