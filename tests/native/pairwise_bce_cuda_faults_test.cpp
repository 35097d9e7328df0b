// SPDX-License-Identifier: Apache-2.0
// What the emulator is worth: of each family of kernels a small problem is run once for every place in their source
// that synchronises or copies, without it, in a process of its own. Results must then be wrong, or the emulator must
// end the program, in one of several orders of warps.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <map>
#include <set>
#include <utility>

#include "cuda_test_problem.h"

namespace {

using namespace mio_ext;

struct Family {
  const char* name;
  Case problem;
  Options options;
};

// The result, held to what the kernels' own test holds it to.
bool right(const Family& family) {
  const Type& type = kTypes[0];
  const Case& c = family.problem;
  const int64_t k = c.k ? c.k : c.m;
  const Input x(type, c.m, c.d, 1, 1), y(type, k, c.d, 1, 2);
  std::vector<int64_t> x_ids(c.m), y_ids(k);
  for (int64_t i = 0; i < c.m; ++i) x_ids[i] = i % 7;
  for (int64_t j = 0; j < k; ++j) y_ids[j] = j % 7;
  const LossParams params{4, 3, -0.5, 0.5, 1.0 / 64, 0};
  const Result expected = by_double_loop(c, x.values, y.values, x_ids, y_ids, params);
  const Outputs out = run(type, c, params, x, y, x_ids, y_ids, family.options);
  return std::abs(out.loss / expected.loss - 1) < type.loss_limit &&
         std::abs(out.stats[5] - expected.mean_product) * std::sqrt(double(c.d)) < 1e-6 &&
         relative_distance(out.dx, expected.dx) < type.gradient_limit &&
         (!c.k || relative_distance(out.dy, expected.dy) < type.gradient_limit);
}

pid_t start_without(const Family& family, const emulator::LeftOut::Key& place) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child != 0) return child;
  if (!std::freopen("/dev/null", "w", stdout)) std::_Exit(2);
  alarm(60);
  emulator::left_out.one = true;
  emulator::left_out.which = place;
  for (unsigned seed = 1; seed <= 10; ++seed) {
    emulator::machine.random.seed(seed);
    if (!right(family)) std::_Exit(1);
  }
  std::_Exit(0);
}

using Places = std::set<emulator::LeftOut::Key>;

Places places_of(const Family& family) {
  emulator::left_out.recording = true;
  if (!right(family)) emulator::fail("wrong as it is");
  emulator::left_out.recording = false;
  return std::exchange(emulator::left_out.passed, {});
}

// Adds to `seen` the places of a family whose absence shows; those that are there already have been tried.
void try_all(const Family& family, const Places& places, Places& seen) {
  std::map<pid_t, emulator::LeftOut::Key> running;
  auto wait_for_one = [&] {
    int status = 0;
    const auto child = running.find(wait(&status));
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) seen.insert(child->second);
    running.erase(child);
  };
  for (const auto& place : places) {
    if (seen.count(place)) continue;
    if (long(running.size()) >= sysconf(_SC_NPROCESSORS_ONLN)) wait_for_one();
    running.emplace(start_without(family, place), place);
  }
  while (!running.empty()) wait_for_one();
}

}  // namespace

int main() {
  Options one, several, hopper, wide, hopper_wide;
  several.multiprocessors = 6;
  hopper.hopper = hopper_wide.hopper = true;
  wide.most_chunk_rows = hopper_wide.most_chunk_rows = kChunkMultiple;
  const Family families[] = {
      {"portable", {140, 1100, 64, 3, 500, false, true, false}, one},
      {"portable, in one launch", {140, 1000, 64, 3, 0, false, true, false}, several},
      {"hopper", {140, 1100, 64, 3, 500, false, true, false}, hopper},
      {"wide rows", {290, 300, 320, 3, 5, false, true, false}, wide},
      {"wide rows on hopper", {290, 300, 264, 3, 5, false, true, false}, hopper_wide},
      {"portable, ids", {140, 1100, 64, 3, 500, false, true, true}, one},
      {"hopper, ids", {140, 1100, 64, 3, 500, false, true, true}, hopper},
      {"wide rows, ids", {290, 300, 320, 3, 5, false, true, true}, wide},
      {"wide rows on hopper, ids", {290, 300, 264, 3, 5, false, true, true}, hopper_wide},
  };
  Places all, seen;
  for (const Family& family : families) {
    const Places places = places_of(family);
    std::printf("%s: %zu places\n", family.name, places.size());
    all.insert(places.begin(), places.end());
    try_all(family, places, seen);
  }
  for (const auto& place : all)
    if (!seen.count(place)) std::printf("nobody misses %s:%u\n", std::get<0>(place).c_str(), std::get<1>(place));
  std::printf("%zu of %zu faults not seen\n", all.size() - seen.size(), all.size());
  return all.size() != seen.size() || all.empty();
}
