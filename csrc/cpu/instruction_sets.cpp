// SPDX-License-Identifier: Apache-2.0
// Compiles the CPU kernel once per instruction set and runs the one that machine.cpp picks.
#include "buffers.h"
#include "pairwise_bce_cpu.h"
#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#if defined(MIO_X86_TARGETS)
#include <immintrin.h>
#endif

namespace mio_ext {

// Ids of any size become small numbers, equal where the ids are: a vector lane holds one.
class Ranks {
 public:
  Ranks(const int64_t* x_ids, int64_t m, const int64_t* y_ids, int64_t k) {
    if (x_ids) sorted_.assign(x_ids, x_ids + m);
    if (y_ids) sorted_.insert(sorted_.end(), y_ids, y_ids + k);
    std::sort(sorted_.begin(), sorted_.end());
    sorted_.erase(std::unique(sorted_.begin(), sorted_.end()), sorted_.end());
  }
  int64_t operator()(int64_t id) const {
    return std::lower_bound(sorted_.begin(), sorted_.end(), id) - sorted_.begin();
  }
  int64_t size() const { return int64_t(sorted_.size()); }

 private:
  std::vector<int64_t> sorted_;
};

}  // namespace mio_ext

#if defined(MIO_X86_TARGETS)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma,avx2")
#define MIO_ISA avx512bf16
#define MIO_VECTOR_BYTES 64
#define MIO_MR 8
#define MIO_NV 2
#define MIO_BFLOAT16
#include "sweep.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,avx2")
#define MIO_ISA avx512
#define MIO_VECTOR_BYTES 64
#define MIO_MR 8
#define MIO_NV 2
#include "sweep.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("fma,avx2")
#define MIO_ISA avx2
#define MIO_VECTOR_BYTES 32
#define MIO_MR 4
#define MIO_NV 2
#include "sweep.h"
#pragma GCC pop_options

#endif

#define MIO_ISA portable
#define MIO_VECTOR_BYTES 16
#define MIO_MR 4
#define MIO_NV 2
#include "sweep.h"

namespace mio_ext {

template <typename T>
PairSums pairwise_bce_on_threads(const PairwiseBCE<T>& problem, int threads, const ParallelFor& parallel) {
#if defined(MIO_X86_TARGETS)
  const std::string& chosen = cpu_instruction_set();
  if (chosen == "avx512bf16") return avx512bf16::run(problem, threads, parallel);
  if (chosen == "avx512") return avx512::run(problem, threads, parallel);
  if (chosen == "avx2") return avx2::run(problem, threads, parallel);
#endif
  return portable::run(problem, threads, parallel);
}

// A small problem is done in the time that another thread may take to be given a core, and the call returns no sooner
// than that thread. So: one for every 2^23 pairs times features (docs/performance.md).
template <typename T>
PairSums pairwise_bce_cpu(const PairwiseBCE<T>& p, int threads, const ParallelFor& parallel) {
  const double products = double(p.m) * double(p.k) * double(p.d) / (p.y == nullptr ? 2 : 1);
  return pairwise_bce_on_threads(p, int(std::clamp(products / (1 << 23), 1.0, double(threads))), parallel);
}

template PairSums pairwise_bce_on_threads(const PairwiseBCE<float>&, int, const ParallelFor&);
template PairSums pairwise_bce_on_threads(const PairwiseBCE<double>&, int, const ParallelFor&);
template PairSums pairwise_bce_cpu(const PairwiseBCE<float>&, int, const ParallelFor&);
template PairSums pairwise_bce_cpu(const PairwiseBCE<double>&, int, const ParallelFor&);

}  // namespace mio_ext
