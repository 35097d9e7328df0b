// SPDX-License-Identifier: Apache-2.0
// What this machine can run, and which of it is to be taken. Apart from the kernels: the module mio_ext._C tells it
// too.
#include <cstdlib>
#include <stdexcept>

#include "pairwise_bce_cpu.h"

namespace mio_ext {

std::vector<std::string> cpu_instruction_sets() {
  std::vector<std::string> names;
#if defined(MIO_X86_TARGETS)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    if (__builtin_cpu_supports("avx512bf16")) names.push_back("avx512bf16");
    names.push_back("avx512");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back("avx2");
#endif
  names.push_back("portable");
  return names;
}

const std::string& cpu_instruction_set() {
  static const std::string name = [] {
    const std::vector<std::string> names = cpu_instruction_sets();
    const char* wish = std::getenv("MIO_CPU_ISA");
    if (wish == nullptr) return names.front();
    for (const std::string& n : names)
      if (n == wish) return n;
    throw std::runtime_error(std::string("MIO_CPU_ISA: this machine cannot run \"") + wish + "\"");
  }();
  return name;
}

}  // namespace mio_ext
