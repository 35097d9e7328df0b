// SPDX-License-Identifier: Apache-2.0
// The CPU kernel against a plain double loop over pairs, for every instruction set this machine has
// (MIO_CPU_ISA chooses; without it this program runs itself once for each).
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/openmp_threads.h"
#include "cpu/schedule.h"
#include "double_loop.h"

namespace {

using mio_ext::PairSums;
using mio_ext::PairwiseBCE;

using mio_ext::by_double_loop;
using mio_ext::Case;
using mio_ext::random_matrix;
using mio_ext::relative_distance;
using mio_ext::Result;

// Threads of its own for every call. ThreadSanitizer knows their joins; the barriers of libgomp, which is not built for
// it, it does not, and would call what follows them a race.
void parallel_on_std_threads(int n, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 1; i < n; ++i) threads.emplace_back(body, i);
  body(0);
  for (std::thread& thread : threads) thread.join();
}

#if defined(__SANITIZE_THREAD__)
constexpr auto parallel = parallel_on_std_threads;
#else
constexpr auto parallel = mio_ext::parallel_on_openmp;
#endif

// The nearest bfloat16, ties away from zero.
float bfloat16(double value) {
  const float v = float(value);
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits = (bits + 0x8000u) & 0xffff0000u;
  float rounded;
  std::memcpy(&rounded, &bits, sizeof bits);
  return rounded;
}

// limit: of the loss's relative error; grad_limit: of the gradients'.
template <typename T>
bool check(const Case& c, double limit, double grad_limit, bool bf16 = false) {
  const int64_t k = c.k ? c.k : c.m;
  const std::vector<double> x = random_matrix(c.m, c.d, 1), y = random_matrix(k, c.d, 2);
  std::vector<T> x_t(x.begin(), x.end()), y_t(y.begin(), y.end());
  if (bf16)
    for (std::vector<T>* z : {&x_t, &y_t})
      for (T& v : *z) v = bfloat16(v);
  const std::vector<double> x_seen(x_t.begin(), x_t.end()), y_seen(y_t.begin(), y_t.end());
  std::vector<int64_t> x_ids(c.m), y_ids(k);
  for (int64_t i = 0; i < c.m; ++i) x_ids[i] = (i * 7 % 5) << 40;
  for (int64_t j = 0; j < k; ++j) y_ids[j] = (j * 3 % 5) << 40;

  PairwiseBCE<T> p{};
  p.x = x_t.data();
  p.y = c.k ? y_t.data() : nullptr;
  p.x_ids = c.ids ? x_ids.data() : nullptr;
  p.y_ids = c.ids && c.k ? y_ids.data() : nullptr;
  p.m = c.m, p.k = k, p.d = c.d;
  p.shift = c.shift, p.offset = c.offset;
  p.exclude_self = c.exclude_self, p.normalize = c.normalize, p.bfloat16 = bf16;
  p.params = {4, 3, -0.5, 0.5, 0.02, c.normalize ? 0.3 : 0.0};
  const Result expected = by_double_loop(c, x_seen, y_seen, x_ids, y_ids, p.params);

  bool good = true;
  std::vector<T> first, first_dy;
  for (int threads : {1, 2, 5}) {
    std::vector<T> dx(c.m * c.d), dy(c.k * c.d);
    p.dx = dx.data();
    p.dy = c.k ? dy.data() : nullptr;
    const PairSums sums = mio_ext::pairwise_bce_on_threads(p, threads, parallel);
    const double loss_error = std::abs(p.params.loss(sums) / expected.loss - 1);
    const double dx_error = relative_distance(dx, expected.dx);
    const double dy_error = c.k ? relative_distance(dy, expected.dy) : 0;
    // Written so that NaN fails.
    good = good && loss_error < limit && dx_error < grad_limit && dy_error < grad_limit;
    if (threads == 1) first = dx, first_dy = dy;
    good = good && dx == first && dy == first_dy;
    if (!good) {
      std::printf("FAILED m=%ld k=%ld d=%ld%s threads=%d: loss %.1e dx %.1e dy %.1e%s\n", long(c.m), long(c.k),
                  long(c.d), bf16 ? " bfloat16" : "", threads, loss_error, dx_error, dy_error,
                  dx == first && dy == first_dy ? "" : ", other bits than one thread");
      return false;
    }
  }
  return good;
}

// Every tile once, between the first and the last visit of its blocks, and no block twice at a time; its tiles come in
// one order, whatever the number of workers.
bool check_schedule(int64_t rows, int64_t cols, bool symmetric) {
  using Tiles = std::vector<std::pair<int64_t, int64_t>>;
  std::vector<Tiles> expected;  // of each block: rows, then columns
  for (int workers : {1, 2, 5, 16}) {
    mio_ext::Schedule schedule(rows, cols, symmetric, workers);
    std::vector<Tiles> tiles(size_t(symmetric ? rows : rows + cols));
    std::vector<std::atomic<bool>> busy(tiles.size());
    std::atomic<bool> met{false};
    std::vector<std::atomic<int>> begun(tiles.size()), ended(tiles.size());
    auto of = [&](mio_ext::Schedule::Side side, int64_t b) {
      return size_t(side == mio_ext::Schedule::kRows ? b : rows + b);
    };
    auto first = [&](mio_ext::Schedule::Side side, int64_t b) {
      if (begun[of(side, b)]++ != 0 || !tiles[of(side, b)].empty()) met = true;
    };
    auto last = [&](mio_ext::Schedule::Side side, int64_t b) {
      const size_t expected_tiles = size_t(side == mio_ext::Schedule::kRows ? cols : rows);
      if (ended[of(side, b)]++ != 0 || tiles[of(side, b)].size() != expected_tiles) met = true;
    };
    auto tile = [&](int64_t row, int64_t col) {
      std::set<int64_t> blocks{row, symmetric ? col : rows + col};
      for (int64_t b : blocks)
        if (busy[size_t(b)].exchange(true) || begun[size_t(b)] != 1 || ended[size_t(b)] != 0) met = true;
      for (int64_t b : blocks) tiles[size_t(b)].push_back({row, col});
      std::this_thread::yield();
      for (int64_t b : blocks) busy[size_t(b)] = false;
    };
    std::vector<std::thread> threads;
    for (int w = 0; w < workers; ++w) threads.emplace_back([&] { schedule.work(first, tile, last); });
    for (std::thread& thread : threads) thread.join();
    for (const auto& times : {&begun, &ended})
      for (const std::atomic<int>& n : *times) met = met || n != 1;
    if (workers == 1) expected = tiles;
    std::set<std::pair<int64_t, int64_t>> seen;
    int64_t count = 0;
    for (int64_t b = 0; b < rows; ++b)
      for (const auto& t : tiles[size_t(b)])
        if (t.first == b) seen.insert(t), ++count, met = met || (symmetric && t.second < t.first);
    const int64_t all = symmetric ? rows * (rows + 1) / 2 : rows * cols;
    if (met || tiles != expected || count != all || int64_t(seen.size()) != all) {
      std::printf("FAILED schedule of %ld x %ld for %d workers\n", long(rows), long(cols), workers);
      return false;
    }
  }
  return true;
}

// Four calls at once, of several sizes and from threads of several kinds: no call waits for another's threads or for
// its own, and all have the bits of a call by itself.
template <typename T>
bool check_calls_at_once() {
  for (const int64_t n : {2, 90, 600}) {
    const int64_t d = 70;
    const std::vector<double> features = random_matrix(n, d, 3);
    const std::vector<T> x(features.begin(), features.end());
    std::vector<std::vector<T>> dx(9, std::vector<T>(n * d));
    auto call = [&](int i, const mio_ext::ParallelFor& threads) {
      PairwiseBCE<T> p{};
      p.x = x.data(), p.m = p.k = n, p.d = d;
      p.shift = n / 2, p.exclude_self = p.normalize = true;
      p.params = {4, 3, -0.5, 0.5, 0.02, 0.3};
      p.dx = dx[size_t(i)].data();
      mio_ext::pairwise_bce_on_threads(p, 3, threads);
    };
    call(8, parallel);
    parallel(4, [&](int i) { call(i, parallel); });  // within a parallel region, where another gets one thread
    parallel_on_std_threads(4, [&](int i) { call(4 + i, parallel_on_std_threads); });
    for (const auto& other : dx)
      if (other != dx[8]) return std::printf("FAILED calls at once, n=%ld: other bits\n", long(n)), false;
  }
  return true;
}

}  // namespace

int main(int, char** argv) {
  if (std::getenv("MIO_CPU_ISA") == nullptr) {
    int failures = 0;
    std::vector<std::string> sets = mio_ext::cpu_instruction_sets();
#if defined(__SANITIZE_THREAD__)
    sets.resize(1);  // threads meet in the schedule, which is the same in all of them
#endif
    for (const std::string& isa : sets) failures += std::system(("MIO_CPU_ISA=" + isa + " " + argv[0]).c_str()) != 0;
    return failures != 0;
  }
  const Case cases[] = {
      {1, 1, 1, 0, 0, false, false, false},      {3, 7, 5, 0, 2, false, false, false},
      {65, 31, 33, 1, 0, true, true, false},     {200, 333, 24, 5, 3, true, true, false},
      {200, 333, 24, 0, 1, true, false, true},   {1300, 1000, 9, 0, 0, false, false, false},
      {700, 90, 300, 0, 0, false, true, true},   {4, 0, 3, 2, 0, true, true, false},
      {33, 0, 16, 0, 0, false, false, false},    {250, 0, 20, 125, 0, true, true, false},
      {1026, 0, 129, 513, 0, true, true, false}, {1026, 0, 17, 513, 0, true, true, true},
      {3000, 0, 8, 1500, 0, true, true, false},
  };
  int failures = !check_calls_at_once<float>() + !check_calls_at_once<double>();
  for (const int64_t rows : {1, 2, 3, 8, 13, 16, 70}) {
    failures += !check_schedule(rows, rows, true);
    for (const int64_t cols : {1, 4, 7, 33}) failures += !check_schedule(rows, cols, false);
  }
  for (const Case& c : cases) {
    failures += !check<float>(c, 1e-6, 1e-5) + !check<double>(c, 1e-13, 1e-12);
    failures += !check<float>(c, 1e-6, 3e-3, true);  // sigma may be rounded to bfloat16
  }
  std::printf("%s: %d failures in %zu cases and the schedules\n", mio_ext::cpu_instruction_set().c_str(), failures,
              3 * std::size(cases));
  return failures != 0;
}
