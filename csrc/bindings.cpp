// SPDX-License-Identifier: Apache-2.0
// The Python module mio_ext._C: what `python -m mio_ext` tells of a build beyond what is needed. The ops do without it,
// and a wheel for every Python has none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "cpu/pairwise_bce_cpu.h"

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__ ", torch " TORCH_VERSION;  // Clang's names itself
#else
constexpr const char* kCompiler = "GCC " __VERSION__ ", torch " TORCH_VERSION;
#endif

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = kCompiler;
#if defined(MIO_WITH_CUDA)
  m.attr("cuda") = MIO_WITH_CUDA;  // the architectures that were compiled for
#else
  m.attr("cuda") = pybind11::none();
#endif
  m.def("cpu_instruction_sets", &mio_ext::cpu_instruction_sets, "What this machine can run, best first.");
  m.def("cpu_instruction_set", &mio_ext::cpu_instruction_set, "The one in use; MIO_CPU_ISA overrides.");
}
