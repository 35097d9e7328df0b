// SPDX-License-Identifier: Apache-2.0
// The CPU kernel's face, free of torch.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../pairwise_bce.h"

// GCC compiles parts of a file for other targets than the rest; clang ignores the pragma for that.
#if defined(__x86_64__) && !defined(__clang__)
#define MIO_X86_TARGETS
#endif

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

// Instruction sets this machine can run, best first, and the one in use (MIO_CPU_ISA overrides).
std::vector<std::string> cpu_instruction_sets();
const std::string& cpu_instruction_set();

}  // namespace mio_ext
