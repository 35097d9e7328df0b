// SPDX-License-Identifier: Apache-2.0
// The CPU kernel's face, free of torch.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../pairwise_bce.h"

namespace mio_ext {

// parallel(n, body) calls body(0) ... body(n - 1), on up to n threads, and returns when all have.
using ParallelFor = std::function<void(int, const std::function<void(int)>&)>;

// Writes problem.dx and problem.dy where they are wanted and returns the sums of the pass, on as many of `threads` as
// the work pays for. The result has the same bits for any number of them.
template <typename T>
PairSums pairwise_bce_cpu(const PairwiseBCE<T>& problem, int threads, const ParallelFor& parallel);

// The same on all of `threads`.
template <typename T>
PairSums pairwise_bce_on_threads(const PairwiseBCE<T>& problem, int threads, const ParallelFor& parallel);

// c [m, n] (+)= a b, pairs of bfloat16 multiplied into float32 sums: a [m, k], b [k, n] in pairs along the sum. A
// library's, which may know instructions that this code does not (AMX).
using PairProduct = void (*)(int64_t m, int64_t n, int64_t k, const uint32_t* a, int64_t lda, const uint32_t* b,
                             int64_t ldb, float* c, int64_t ldc, bool accumulate);
extern PairProduct library_product;  // nullptr: there is none

// Instruction sets this machine can run, best first, and the one in use (MIO_CPU_ISA overrides). "onednn" is
// avx512bf16, with the library's product for pairs.
std::vector<std::string> cpu_instruction_sets();
std::string cpu_instruction_set();

}  // namespace mio_ext
