// SPDX-License-Identifier: Apache-2.0
// Faults for pairwise_bce_cuda_faults_test.cpp: the emulator's instructions that synchronise or copy know where in the
// kernels' source they are called, and one such place at a time can be left out. But for a ticket's barriers: they are
// about other blocks, which run one after the other here.
#pragma once

#include <set>
#include <source_location>
#include <string>
#include <tuple>

namespace emulator {

using Place = std::source_location;

struct LeftOut {
  using Key = std::tuple<std::string, unsigned, unsigned>;
  bool recording = false, one = false;
  std::set<Key> passed;  // while recording
  Key which;             // if `one`

  bool is(const Place& at) {
    if (!recording && !one) return false;
    if (std::string(at.function_name()).find("last_to_arrive") != std::string::npos) return false;
    const Key key(at.file_name(), at.line(), at.column());
    if (recording) passed.insert(key);
    return one && key == which;
  }
};
inline LeftOut left_out;

}  // namespace emulator

// The last argument of an instruction, and its first statement.
#define MIO_PLACE const emulator::Place& place = emulator::Place::current()
#define MIO_MAY_BE_LEFT_OUT \
  if (emulator::left_out.is(place)) return
