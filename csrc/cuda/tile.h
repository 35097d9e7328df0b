// SPDX-License-Identifier: Apache-2.0
// Where things are: which columns are special for a row, where a number lies in shared memory, and which block
// takes which part of the matrix. Small functions for host and device, tested on the host.
#pragma once

#include <cstdint>

#include "../pairwise_bce.h"
#include "mma.cuh"

namespace mio_ext {

MIO_HOST_DEVICE constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// The letters of templates, everywhere: A is an arithmetic, one of the following; T a Tile, its shape for A; F the row
// fragments, of 16 rows, that a warp has of a tile; N the column fragments, of 8 columns.
//
// An arithmetic: the features as they come, and what the tensor cores take for one, kParts Elements. kLift raises G,
// the left operand of the second product, at most 1 in magnitude, from float16's floor.
struct Bf16 {
  using Feature = Bfloat16;
  using Element = Bfloat16;
  static constexpr int kParts = 1;
  static constexpr float kLift = 1;
};
struct Fp16 {
  using Feature = Float16;
  using Element = Float16;
  static constexpr int kParts = 1;
  static constexpr float kLift = 32768;
};
struct Tf32 {
  using Feature = float;
  using Element = float;  // rounded; the tensor cores would cut off
  static constexpr int kParts = 1;
  static constexpr float kLift = 1;
};
// For a library, which does as it is told.
struct Fp32 : Tf32 {};
// float32 as the sum of two float16 numbers, the larger first: three products. Rows and G are scaled by powers
// of two, which brings them into float16's range.
struct Fp16x3 {
  using Feature = float;
  using Element = Float16;
  static constexpr int kParts = 2;
  static constexpr float kLift = 1;
};

constexpr int kRowMultiple = 128;  // prepared rows are padded to it; every kBlockM and kBlockN divides it

// How prepared rows lie. Dense: one after the other. Tiled, as compute capability 9.0 takes features of 16 bits:
// kRowMultiple rows after the others, of these 64 features after the others, and there a row is 128 bytes, of which the
// 16-byte chunk c of row r lies at c ^ (r % 8). Gathered: tiled, with row r in the place of gathered(r).
enum class Layout { kDense, kTiled, kGathered };
constexpr int kBlockRowBytes = 128;
constexpr int kBlockFeatures = 64;

// Bits 1 and 2 of a number change places with bits 3 and 4; twice, and it is the number again.
MIO_HOST_DEVICE constexpr int gathered(int row) { return (row & ~30) | (row >> 2 & 6) | (row << 2 & 24); }

// Where a row begins, in bytes, and how many elements further on its feature f is.
MIO_HOST_DEVICE int64_t row_at(Layout layout, int row, int row_bytes) {
  if (layout == Layout::kDense) return int64_t(row) * row_bytes;
  const int place = layout == Layout::kGathered ? gathered(row) : row;
  return int64_t(place / kRowMultiple) * kRowMultiple * row_bytes + place % kRowMultiple * kBlockRowBytes;
}
MIO_HOST_DEVICE int feature_at(Layout layout, int row, int f) {
  if (layout == Layout::kDense) return f;
  const int place = layout == Layout::kGathered ? gathered(row) : row;
  return f / kBlockFeatures * (kRowMultiple * kBlockFeatures) + (f / 8 % 8 ^ place % 8) * 8 + f % 8;
}

// An id of 31 bits is its own key. Others have a hash, with the top bit set: equal ones may be of different ids.
constexpr uint64_t kKeyFactor = 0x9e3779b97f4a7c15u;
MIO_HOST_DEVICE constexpr uint32_t key_of(int64_t id) {
  const uint64_t bits = uint64_t(id);
  return bits >> 31 == 0 ? uint32_t(bits) : uint32_t(bits * kKeyFactor >> 32) | 0x80000000u;
}
MIO_HOST_DEVICE constexpr bool is_hashed(uint32_t key) { return key >> 31 != 0; }
// Are some of these rows there, and others not?
MIO_HOST_DEVICE constexpr bool is_cut(int row0, int rows, int n) { return row0 < n && n < row0 + rows; }

// Which rows and columns of a tile a thread's numbers are. Of every 16 x 8 places an accumulator holds rows g and g + 8
// and columns 2q, 2q + 1, with g = lane / 4 and q = lane % 4. Where the operands' rows are gathered, its second row is
// 2 after its first, and what a thread has of 32 columns lies side by side: 16 bytes of G.
struct Straight {
  using Factors = Straight;
  static constexpr int kNextRow = 8, kLaneColumns = 2;
  MIO_HOST_DEVICE static constexpr int column(int n) { return 8 * n; }  // the first, where q = 0
};
struct Gathered {
  using Factors = Gathered;
  static constexpr int kNextRow = 2, kLaneColumns = 8;
  MIO_HOST_DEVICE static constexpr int column(int n) { return n / 4 * 32 + n % 4 * 2; }
};
struct GatheredColumns : Gathered {  // and the rows as they are
  static constexpr int kNextRow = 8;
};
struct GatheredFactors : Straight {  // the norms' factors alone
  using Factors = Gathered;
};

// A block of four warps owns kBlockM rows, kRowFragments x 16 to a warp, and goes over tiles of kBlockN columns.
// What fills registers is the rows' gradient: kRowFragments kWidth / 2 numbers a thread. Two row fragments a warp
// halve the traffic from shared memory, which at one would bound the rate; at 256 features there is room for one.
// All of them fit into 99 KiB, the least that a GPU of capability 8.0 or later lets a block have.
template <class A, int kWidth_>
struct Tile {
  static constexpr Layout kLayout = Layout::kDense;
  static constexpr int kWidth = kWidth_;  // features, padded
  // A block makes the gradient of this many features. Halves of 256 would not fit in registers: there the sweep is
  // done twice.
  static constexpr int kSlice = A::kParts == 2 && kWidth == 256 ? 128 : kWidth;
  static constexpr int kSlices = kWidth / kSlice;
  static constexpr int kParts = A::kParts;
  static constexpr int kPartBytes = kWidth * int(sizeof(typename A::Element));
  static constexpr int kRowBytes = kParts * kPartBytes;  // the larger parts of all features, then the smaller
  static constexpr int kBytes = kRowBytes / kWidth;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowFragments = kBytes == 2 && kWidth <= 128 ? 2 : 1;
  static constexpr int kBlockM = 16 * kRowFragments * kWarps;
  static constexpr int kBlockN = kBytes == 4 && kWidth == 256 ? 16 : 32;
  static constexpr int kStages = kBytes == 2 ? 3 : 2;
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr bool kProductsInLoop = true;  // their sums

  static constexpr int kSteps = kPartBytes / 32;  // of a matrix instruction along the features
  static constexpr int kFactorsAt = kBlockN * kRowBytes;
  static constexpr int kKeysAt = kFactorsAt + kBlockN * 4;
  static constexpr int kStageBytes = (kKeysAt + kBlockN * 4 + 127) / 128 * 128;  // swizzled() needs the 128
  static constexpr int kColumnsAt = kBlockM * kRowBytes;                         // the rows come first
  static constexpr int kSharedBytes = kColumnsAt + kStages * kStageBytes;
};

// For compute capability 9.0, features of 16 bits: two consumers of four warps, with 64 rows each, and a
// producer of four. Tiles fill what registers the gradient leaves, and what shared memory a multiprocessor has.
template <class A, int kWidth_>
struct HopperTile {
  static constexpr Layout kLayout = Layout::kTiled;
  static constexpr int kWidth = kWidth_, kSlice = kWidth;
  static constexpr int kRowBytes = 2 * kWidth;
  static constexpr int kConsumers = 2;
  static constexpr int kWarps = 4 * kConsumers, kThreads = 32 * kWarps;  // without the producer's, which come last
  static constexpr int kProducerThreads = 128;
  static constexpr int kConsumerRows = 64;
  static constexpr int kBlockM = kConsumerRows * kConsumers;
  static constexpr int kBlockN = kWidth == 256 ? 64 : 128;
  static constexpr int kStages = 4;
  static constexpr bool kProductsInLoop = false;
  // Of a thread's norms' factors, fours that it reads while the logits are made.
  static constexpr int kFactorsAhead = 2;
  // Registers a thread: 65,536 in all, less than a third of them until producer and consumers divide them up.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  static constexpr int kBlocks = kWidth / kBlockFeatures;
  static constexpr int kFactorsAt = kBlockN * kRowBytes;
  static constexpr int kKeysAt = kFactorsAt + kBlockN * 4;
  static constexpr int kStageBytes = (kKeysAt + kBlockN * 4 + 1023) / 1024 * 1024;
  static constexpr int kColumnsAt = kBlockM * kRowBytes;  // the rows come first
  static constexpr int kBarriersAt = kColumnsAt + kStages * kStageBytes;
  static constexpr int kSharedBytes = kBarriersAt + 8 * (2 * kStages + 1);
};

// The chunked path's, for compute capability 9.0: logits of a tile over all features, 64 at a time. The blocks of a
// cluster have tiles below each other.
struct WideTile {
  static constexpr int kCluster = 2;
  static constexpr int kConsumers = 2;
  static constexpr int kWarps = 4 * kConsumers, kThreads = 32 * kWarps;  // without the producer's, which come last
  static constexpr int kProducerThreads = 128;
  static constexpr int kConsumerRows = 64;
  static constexpr int kBlockM = kConsumerRows * kConsumers;
  static constexpr int kBlockN = 256;  // 128 registers a thread
  static constexpr int kClusterRows = kCluster * kBlockM;
  static constexpr int kStages = 4;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  static constexpr int kGroupBytes = kRowMultiple * kBlockRowBytes;  // 128 rows of 64 features, one bulk copy
  static constexpr int kColumnsAt = kBlockM * kBlockRowBytes;        // in a stage; the rows come first
  static constexpr int kStageBytes = kColumnsAt + kBlockN * kBlockRowBytes;
  static constexpr int kFactorsAt = kStages * kStageBytes, kFactorBytes = kBlockN * 4;  // of this tile and the next
  static constexpr int kKeysAt = kFactorsAt + 2 * kFactorBytes;                         // likewise
  static constexpr int kBarriersAt = kKeysAt + 2 * kFactorBytes;
  static constexpr int kSharedBytes = kBarriersAt + 16 * kStages;
};

// The same with the matrix instructions that every capability has: 32 features at a time, in shared memory that lets
// two blocks on a multiprocessor of 100 KiB.
struct PortableWideTile {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kBlockM = 128, kBlockN = 128;
  static constexpr int kWarpM = 32, kWarpN = 64;  // of a warp: two row fragments
  static constexpr int kStages = 3;
  static constexpr int kFeatures = 32, kRowBytes = 2 * kFeatures;
  static constexpr int kColumnsAt = kBlockM * kRowBytes;  // in a stage; the rows come first
  static constexpr int kStageBytes = kColumnsAt + kBlockN * kRowBytes;
  static constexpr int kFactorsAt = kStages * kStageBytes;
  static constexpr int kKeysAt = kFactorsAt + kBlockN * 4;
  static constexpr int kSharedBytes = kKeysAt + kBlockN * 4;

  // Two rows share 128 bytes, and chunk c of row r lies at c ^ (r / 2 % 4) of its half: eight rows of one chunk fill
  // all banks once.
  MIO_HOST_DEVICE static constexpr uint32_t place(uint32_t row, uint32_t chunk) {
    return row / 2 * 128 + row % 2 * 64 + ((chunk ^ (row / 2 % 4)) << 4);
  }
};

// Rows in shared memory are whole multiples of 128 bytes, so equal columns of all rows share a bank. The 16-byte
// chunk c of row r lies at c ^ (r % 8): eight rows of one chunk, or two neighbouring chunks of rows 0, 2, 4, 6
// or 1, 3, 5, 7, then fill all 32 banks once.
MIO_HOST_DEVICE constexpr uint32_t swizzled(uint32_t row, uint32_t chunk, uint32_t row_bytes) {
  return row * row_bytes + ((chunk ^ (row & 7)) << 4);
}
// The same, `chunk` further along, from the place of a chunk c with c & chunk = 0. With chunk known to the compiler
// that is one instruction.
MIO_HOST_DEVICE constexpr uint32_t along(uint32_t place, uint32_t chunk) {
  return (place ^ ((chunk & 7) << 4)) + ((chunk >> 3) << 7);
}

// Where tiles of one row block begin that may hold a positive or own pair: from each of these columns on, so many.
struct Crossings {
  int first[3];
  uint32_t places;
  MIO_HOST_DEVICE bool at(int col0) const {
    return uint32_t(col0 - first[0]) < places || uint32_t(col0 - first[1]) < places ||
           uint32_t(col0 - first[2]) < places;
  }
};

// The positive and the own column of a row; -1: none. In (i, j) of the op, the positive of row i is column
// offset + (i + shift) mod M and its own column offset + i; a transposed sweep has j for rows.
struct Pairs {
  int m, k;  // rows and columns of the op
  int shift, offset;
  bool exclude_self, transposed;

  MIO_HOST_DEVICE int own(int row) const {
    if (!exclude_self) return -1;
    return transposed ? (row >= offset && row < offset + m ? row - offset : -1)
                      : (offset + row < k ? offset + row : -1);
  }
  MIO_HOST_DEVICE int positive(int row) const {
    int i = transposed ? row - offset : row;
    if (i < 0 || i >= m) return -1;
    i += transposed ? -shift : shift;
    i += i < 0 ? m : i >= m ? -m : 0;
    const int column = transposed ? i : offset + i;
    return column < (transposed ? m : k) && column != own(row) ? column : -1;
  }
  // Of a block of `rows` rows from row0 on, with tiles of `cols` columns.
  MIO_HOST_DEVICE Crossings crossings(int row0, int rows, int cols) const {
    const int sign = transposed ? -1 : 1, first = row0 - cols + 1, positive = first + sign * (offset + shift);
    return {{exclude_self ? first + sign * offset : positive, positive, positive - sign * m},
            uint32_t(rows + cols - 1)};
  }
};

// Splits columns among blocks where there are too few rows to fill the machine.
struct Plan {
  int row_blocks, splits, tiles_per_split;
};
constexpr int64_t kSplitBytes = 16 << 20, kHopperSplitBytes = 64 << 20;  // that partial gradients may take

// slots: blocks that run at a time; most_blocks: there may be, unless one split has more; together: these wait for each
// other.
inline Plan plan_sweep(int rows, int cols, int d, int block_m, int block_n, int slots, int most_blocks, bool together,
                       int64_t most_bytes = kSplitBytes) {
  const int row_blocks = ceil_div(rows, block_m), tiles = ceil_div(cols, block_n);
  int64_t most = most_bytes / (int64_t(rows) * d * 4);
  if (most > most_blocks / row_blocks) most = most_blocks / row_blocks;
  if (most > tiles) most = tiles;
  int best = 1;
  double best_time = 0;
  for (int splits = 1; splits == 1 || splits <= most; ++splits) {
    // In tiles' worth: a wave takes its share of the columns and writes its part of the gradient; the last block of
    // a row block reads them all. Together, each block reads all parts of its share of the rows, at once but for what
    // that takes of the way to memory.
    const double time = together ? ceil_div(tiles, splits) + splits / 8.0
                                 : ceil_div(row_blocks * splits, slots) * (double(tiles) / splits + 4) + splits;
    if (splits == 1 || time < best_time) best = splits, best_time = time;
  }
  const int tiles_per_split = ceil_div(tiles, best);
  return {row_blocks, ceil_div(tiles, tiles_per_split), tiles_per_split};
}

// A block has a multiprocessor to itself, so of little more than a whole number of waves the last is nearly idle. Up to
// six waves of shorter blocks even that out: 157 row blocks (20,000 rows) of 132 at a time are two, and in five splits
// each six of a fifth.
template <class T>
Plan plan_hopper(int rows, int cols, int d, int multiprocessors) {
  return plan_sweep(rows, cols, d, T::kBlockM, T::kBlockN, multiprocessors, 6 * multiprocessors, false,
                    kHopperSplitBytes);
}

}  // namespace mio_ext
