// SPDX-License-Identifier: Apache-2.0
// A ParallelFor for programs without torch: the C++ test and the microbenchmark.
#pragma once

#include "pairwise_bce_cpu.h"

namespace mio_ext {

inline void parallel_on_openmp(int n, const std::function<void(int)>& body) {
#pragma omp parallel for num_threads(n) schedule(static, 1)
  for (int i = 0; i < n; ++i) body(i);
}

}  // namespace mio_ext
