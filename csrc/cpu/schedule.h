// SPDX-License-Identifier: Apache-2.0
// Which thread works on which tile, and when.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace mio_ext {

// A count that only grows, and that threads wait for. They spin for as long as waking up would take and block then: a
// thread that spins on, or yields, gives its core and its turn to whatever else runs on the machine.
class Progress {
 public:
  int64_t count() const { return count_.load(std::memory_order_acquire); }

  void reach(int64_t count) {
    count_.store(count);
    if (sleepers_.load() == 0) return;  // both in one total order with wait_for(): one of the two sees the other
    const std::lock_guard lock(mutex_);
    changed_.notify_all();
  }

  void wait_for(int64_t count) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (this->count() >= count) return;
      relax();
    }
    std::unique_lock lock(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(lock, [&] { return count_.load() >= count; });
    sleepers_.fetch_sub(1);
  }

 private:
  static constexpr int kSpins = 200;
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::atomic<int64_t> count_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Deals out tiles so that no two threads ever add to the same block of gradients, in an order that
// does not depend on the number of threads: the result has the same bits on one core and on sixty.
//
// Blocks come in groups of four, of two or one where they are few. In a round every group meets one group, by the
// circle method where y = x (round 0: itself), else row group q meets column group (q + round) mod groups; the 4 x 4
// tiles of two groups of four are four steps, in which every block occurs once. A job is all steps of two
// groups, whose rows and gradients then stay in the cache, or, where that would leave threads without work, a single
// tile. A worker takes the next job of the sequence and waits until both blocks of a tile are done with all earlier
// steps; the owner of an earlier job never waits for a later one, so this cannot deadlock, whatever the number of
// workers.
//
// The first step of a block is the place to prepare it, the last one the place to project it: every block of the other
// side is prepared by then. So there is no barrier anywhere.
class Schedule {
 public:
  enum Side { kRows, kColumns };  // where y = x every block is one of rows

  Schedule(int64_t row_blocks, int64_t col_blocks, bool symmetric, int workers)
      : rows_(row_blocks),
        cols_(col_blocks),
        symmetric_(symmetric),
        group_(group_size(blocks())),
        groups_(symmetric ? (blocks() + 2 * group_ - 1) / (2 * group_) * 2 : (blocks() + group_ - 1) / group_),
        by_groups_(meetings() >= 2 * workers),
        row_done_(group_ * groups_),
        col_done_(symmetric ? 0 : group_ * groups_) {}

  // Calls, for this worker's share, tile(row block, column block), and first(side, block) and last(side, block) before
  // and after all tiles of a block. Blocks beyond the last one make the numbers even.
  template <class First, class Tile, class Last>
  void work(const First& first, const Tile& tile, const Last& last) {
    for (;;) {
      int64_t job = next_.fetch_add(1, std::memory_order_relaxed), round = 0;
      if (job >= jobs(0)) round = 1 + (job - jobs(0)) / jobs(1), job = (job - jobs(0)) % jobs(1);
      if (round >= groups_) return;
      if (by_groups_) {
        for (int64_t step = 0; step < group_; ++step)
          for (int64_t i = 0; i < tiles(round, step); ++i) work_on(round, step, job, i, first, tile, last);
        continue;
      }
      int64_t step = 0;
      for (; job >= meetings(round) * tiles(round, step); ++step) job -= meetings(round) * tiles(round, step);
      work_on(round, step, job / tiles(round, step), job % tiles(round, step), first, tile, last);
    }
  }

 private:
  int64_t blocks() const { return rows_ > cols_ ? rows_ : cols_; }
  static int64_t group_size(int64_t blocks) {
    if (blocks < 8) return 1;
    return blocks < 16 ? 2 : 4;
  }
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

  template <class First, class Tile, class Last>
  void work_on(int64_t round, int64_t step, int64_t meeting, int64_t i, const First& first, const Tile& tile,
               const Last& last) {
    std::pair<int64_t, int64_t> group{meeting, meeting}, block{i, i};
    if (symmetric_ && round > 0) group = pair(groups_, round - 1, meeting);
    if (!symmetric_) group.second = (meeting + round) % groups_;
    if (!alone(round))
      block.second = (i + step) % group_;
    else if (step > 0)
      block = pair(group_, step - 1, i);
    const int64_t row = group_ * group.first + block.first, col = group_ * group.second + block.second;
    Progress &row_done = row_done_[size_t(row)], &col_done = (symmetric_ ? row_done_ : col_done_)[size_t(col)];
    const int64_t before = group_ * round + step;
    row_done.wait_for(before);
    col_done.wait_for(before);
    if (before == 0) visit(row, col, first);
    if (row < rows_ && col < cols_) tile(row, col);
    if (before + 1 == group_ * groups_) visit(row, col, last);
    row_done.reach(before + 1);
    if (&col_done != &row_done) col_done.reach(before + 1);  // twice would take back what others have added
  }

  template <class Visitor>
  void visit(int64_t row, int64_t col, const Visitor& visitor) const {
    if (row < rows_) visitor(kRows, row);
    if (col < cols_ && !(symmetric_ && col == row)) visitor(symmetric_ ? kRows : kColumns, col);
  }

  int64_t rows_, cols_;
  bool symmetric_;
  int64_t group_, groups_;  // blocks of a group, and groups: an even number where y = x
  bool by_groups_;
  std::vector<Progress> row_done_, col_done_;  // steps that a block is done with
  std::atomic<int64_t> next_{0};
};

}  // namespace mio_ext
