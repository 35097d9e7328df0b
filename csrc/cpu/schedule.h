// SPDX-License-Identifier: Apache-2.0
// Which thread works on which tile, and when.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace mio_ext {

// Deals out tiles so that no two threads ever add to the same block of gradients, in an order that
// does not depend on the number of threads: the result has the same bits on one core and on sixty.
//
// Blocks come in groups of four, or of one where all of them are few enough for a cache. In a round every group meets
// one group, by the circle method where y = x (round 0: itself), else row group q meets column group (q + round) mod
// groups; the 4 x 4 tiles of two groups are four steps, in which every block occurs once. A job is all steps of two
// groups, whose rows and gradients then stay in the cache, or, where that would leave threads without work, a single
// tile. A worker takes the next job of the sequence and waits until both blocks of a tile are done with all earlier
// steps; the owner of an earlier job never waits for a later one, so this cannot deadlock, whatever the number of
// workers.
class Schedule {
 public:
  Schedule(int64_t row_blocks, int64_t col_blocks, bool symmetric, int workers)
      : rows_(row_blocks),
        cols_(col_blocks),
        symmetric_(symmetric),
        group_(blocks() < 16 ? 1 : 4),
        groups_(symmetric ? (blocks() + 2 * group_ - 1) / (2 * group_) * 2 : (blocks() + group_ - 1) / group_),
        by_groups_(meetings() >= 2 * workers),
        row_done_(group_ * groups_),
        col_done_(symmetric ? 0 : group_ * groups_) {}

  // Calls tile(row block, column block) for this worker's share. Blocks beyond the last one make the numbers even.
  template <class Tile>
  void work(const Tile& tile) {
    for (;;) {
      int64_t job = next_.fetch_add(1, std::memory_order_relaxed), round = 0;
      if (job >= jobs(0)) round = 1 + (job - jobs(0)) / jobs(1), job = (job - jobs(0)) % jobs(1);
      if (round >= groups_) return;
      if (by_groups_) {
        for (int64_t step = 0; step < group_; ++step)
          for (int64_t i = 0; i < tiles(round, step); ++i) work_on(round, step, job, i, tile);
        continue;
      }
      int64_t step = 0;
      for (; job >= meetings(round) * tiles(round, step); ++step) job -= meetings(round) * tiles(round, step);
      work_on(round, step, job / tiles(round, step), job % tiles(round, step), tile);
    }
  }

 private:
  int64_t blocks() const { return rows_ > cols_ ? rows_ : cols_; }
  // Does each group meet itself?
  bool alone(int64_t round) const { return symmetric_ && round == 0; }
  int64_t meetings(int64_t round = 1) const { return symmetric_ && round > 0 ? groups_ / 2 : groups_; }
  // A group with itself: the tiles on the diagonal, then the pairs of its blocks, two at a time.
  int64_t tiles(int64_t round, int64_t step) const { return alone(round) && step > 0 ? group_ / 2 : group_; }
  int64_t jobs(int64_t round) const {
    if (by_groups_) return meetings(round);
    return meetings(round) * (alone(round) ? group_ * (group_ + 1) / 2 : group_ * group_);
  }

  // Circle method: in round r of n - 1, the q-th pair of n things.
  static std::pair<int64_t, int64_t> pair(int64_t n, int64_t r, int64_t q) {
    const int64_t ring = n - 1, a = (r + q) % ring, b = q == 0 ? ring : (r - q + ring) % ring;
    return a < b ? std::pair{a, b} : std::pair{b, a};
  }

  template <class Tile>
  void work_on(int64_t round, int64_t step, int64_t meeting, int64_t i, const Tile& tile) {
    std::pair<int64_t, int64_t> group{meeting, meeting}, block{i, i};
    if (symmetric_ && round > 0) group = pair(groups_, round - 1, meeting);
    if (!symmetric_) group.second = (meeting + round) % groups_;
    if (!alone(round))
      block.second = (i + step) % group_;
    else if (step > 0)
      block = pair(group_, step - 1, i);
    const int64_t row = group_ * group.first + block.first, col = group_ * group.second + block.second;
    std::atomic<int64_t>&row_done = row_done_[size_t(row)],
    &col_done = (symmetric_ ? row_done_ : col_done_)[size_t(col)];
    const int64_t before = group_ * round + step;
    wait(row_done, before);
    wait(col_done, before);
    if (row < rows_ && col < cols_) tile(row, col);
    row_done.store(before + 1, std::memory_order_release);
    col_done.store(before + 1, std::memory_order_release);
  }

  static void wait(const std::atomic<int64_t>& steps_done, int64_t before) {
    for (int spins = 0; steps_done.load(std::memory_order_acquire) < before; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }

  int64_t rows_, cols_;
  bool symmetric_;
  int64_t group_, groups_;  // blocks of a group, and groups: an even number where y = x
  bool by_groups_;
  std::vector<std::atomic<int64_t>> row_done_, col_done_;  // steps that a block is done with
  std::atomic<int64_t> next_{0};
};

}  // namespace mio_ext
