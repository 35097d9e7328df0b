// SPDX-License-Identifier: Apache-2.0
// Which thread works on which tile, and when.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace mio_ext {

// Deals out tiles so that no two threads ever add to the same block of gradients, in an order that
// does not depend on the number of threads: the result has the same bits on one core and on sixty.
//
// Work is a sequence of rounds; within a round every block occurs at most once. y = x: round 0 holds
// the diagonal tiles, then the circle method pairs every two blocks once. Otherwise round r pairs row
// block q with column block (q + r) mod n. A worker takes the next task of the sequence and waits until
// both its blocks have finished all earlier rounds; the owner of an earlier task never waits for a later
// one, so this cannot deadlock, whatever the number of workers.
class Schedule {
 public:
  Schedule(int64_t row_blocks, int64_t col_blocks, bool symmetric)
      : symmetric_(symmetric),
        // A dummy block makes the circle even, or the rectangle square; its tasks do nothing.
        n_(symmetric ? (row_blocks + 1) / 2 * 2 : (row_blocks > col_blocks ? row_blocks : col_blocks)),
        rounds_(n_),
        row_done_(n_),
        col_done_(symmetric ? 0 : n_) {}

  struct Task {
    int64_t row, col, round;
  };

  // The next task for a worker, ready to run; round < 0: none left.
  Task take() {
    const int64_t diagonal = symmetric_ ? n_ : 0;  // tasks of round 0, where tiles are (q, q)
    const int64_t per_round = symmetric_ ? n_ / 2 : n_;
    const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
    Task t;
    if (index < diagonal) {
      t = {index, index, 0};
    } else {
      const int64_t rest = index - diagonal;
      const int64_t r = rest / per_round, q = rest % per_round;
      if (!symmetric_) {
        t = {q, (q + r) % n_, r};
      } else {
        const int64_t ring = n_ - 1;
        const int64_t a = (r + q) % ring, b = q == 0 ? ring : (r - q + ring) % ring;
        t = {a < b ? a : b, a < b ? b : a, r + 1};
      }
    }
    if (t.round >= rounds_) return {0, 0, -1};
    wait(row_done_.data()[t.row], t.round);
    if (symmetric_) {
      if (t.col != t.row) wait(row_done_.data()[t.col], t.round);
    } else {
      wait(col_done_.data()[t.col], t.round);
    }
    return t;
  }

  void done(const Task& t) {
    row_done_.data()[t.row].store(t.round + 1, std::memory_order_release);
    if (symmetric_ && t.col == t.row) return;
    (symmetric_ ? row_done_ : col_done_).data()[t.col].store(t.round + 1, std::memory_order_release);
  }

 private:
  static void wait(const std::atomic<int64_t>& rounds_done, int64_t round) {
    for (int spins = 0; rounds_done.load(std::memory_order_acquire) < round; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }

  bool symmetric_;
  int64_t n_, rounds_;
  std::vector<std::atomic<int64_t>> row_done_, col_done_;
  std::atomic<int64_t> next_{0};
};

}  // namespace mio_ext
