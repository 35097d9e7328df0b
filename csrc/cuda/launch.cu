// SPDX-License-Identifier: Apache-2.0
// From a problem to launches: lays out the workspace and chooses the kernels. No torch here.
#include <algorithm>

#include "chunked_hopper.cuh"
#include "launch.cuh"

namespace mio_ext {

extern template struct Launch<Bf16>;
extern template struct Launch<Fp16>;
extern template struct Launch<Tf32>;
extern template struct Launch<Fp16x3>;
extern template struct LaunchHopper<Bf16>;
extern template struct LaunchHopper<Fp16>;
extern template struct LaunchChunked<Bf16>;
extern template struct LaunchChunked<Fp16>;
extern template struct LaunchChunked<Fp32>;
extern template struct LaunchChunkedLogits<Bf16>;
extern template struct LaunchChunkedLogits<Fp16>;
extern template struct LaunchChunkedHopper<Bf16>;
extern template struct LaunchChunkedHopper<Fp16>;

namespace {

int padded_width(const PairwiseBCECuda& in) {
  if (is_chunked_hopper(in)) return ceil_div(in.d, kBlockFeatures) * kBlockFeatures;
  if (has_chunked_logits(in)) return ceil_div(in.d, PortableWideTile::kFeatures) * PortableWideTile::kFeatures;
  if (!is_fused(in)) return ceil_div(in.d, 16) * 16;
  return in.d <= 64 ? 64 : in.d <= 128 ? 128 : 256;
}

bool uses_hopper(const PairwiseBCECuda& in) { return in.hopper && is_fused(in) && is_half(in) && (in.dx || in.dy); }
Layout layout_of(const PairwiseBCECuda& in) {
  return is_chunked_hopper(in) ? Layout::kGathered : uses_hopper(in) ? Layout::kTiled : Layout::kDense;
}

// Of chunk_hopper_kernel.
int wide_blocks(const PairwiseBCECuda& in) {
  return std::max(in.multiprocessors / WideTile::kCluster, 1) * WideTile::kCluster;
}

// Rows of which a chunk's G, with gradients and copies of 12 bytes a feature, takes no more than siglip-kernel 0.1.2
// takes for as many rows, which holds gradients of 16 bits and G of up to twice 4096 rows. Where no chunk is that
// small, what is left is speed.
int wide_chunk_rows(const PairwiseBCECuda& in) {
  const int sides = in.y.data ? 2 : 1, fit = std::min(std::max(in.m, in.k), 8192) - 2 * sides * padded_width(in) - 128;
  return fit < kChunkMultiple ? 1024 : fit;
}

// Others: the bytes of float32 products, which grow with the columns alone.
int rows_of_chunk(const PairwiseBCECuda& in, int m_pad, int k_pad) {
  constexpr int64_t kProductBytes = int64_t(512) << 20;
  const int64_t fit = std::min<int64_t>(
      has_chunked_logits(in) ? wide_chunk_rows(in) : kProductBytes / (int64_t(k_pad) * 4), in.most_chunk_rows);
  return int(std::min<int64_t>(std::max<int64_t>(fit / kChunkMultiple, 1) * kChunkMultiple, m_pad));
}

// The smallest tiles of any kernel, so the most blocks there can be.
constexpr int kSmallestBlockM = 64;

// Hands out pieces of the workspace; with memory = nullptr it only counts.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* at = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    return at;
  }
  size_t used() const { return used_; }

 private:
  unsigned char* memory_;
  size_t used_ = 0;
};

struct Workspace {
  Prepared x, y;
  PairSums* records;
  int n_records;
  float* totals;
  unsigned* tickets;  // of both sweeps
  int n_tickets;
  float* parts;
  size_t bytes;

  explicit Workspace(const PairwiseBCECuda& in) {
    Carver carver(in.workspace);
    x = side(carver, in, in.m, in.x_ids, !in.x_direct && (in.y.data ? in.dy : in.dx));
    y = in.y.data ? side(carver, in, in.k, in.y_ids, !in.y_direct && in.dx) : x;
    if (is_fused(in)) {
      // Splits never make more blocks than twice the slots, if one block a row block does not.
      const int64_t blocks = ceil_div(in.m > in.k ? in.m : in.k, kSmallestBlockM),
                    slots = int64_t(in.multiprocessors) * 4;
      n_records = int(2 * blocks + 2 * slots);
      n_tickets = 2 + ceil_div(in.m, kSmallestBlockM) + ceil_div(in.k, kSmallestBlockM);
    } else {
      using T = PortableWideTile;
      const int rows = ceil_div(in.m, kChunkWarps);
      n_records = rows + (is_chunked_hopper(in) ? wide_blocks(in)
                          : has_chunked_logits(in)
                              ? ceil_div(rows_of_chunk(in, x.n_pad, y.n_pad), T::kBlockM) * (y.n_pad / T::kBlockN)
                              : rows);
      n_tickets = 1;
    }
    records = carver.take<PairSums>(n_records);
    const int64_t row_blocks = ceil_div(in.m > in.k ? in.m : in.k, kSmallestBlockM);
    totals = carver.take<float>(uses_hopper(in) ? 2 * row_blocks * padded_width(in) : 0);
    tickets = carver.take<unsigned>(n_tickets);
    parts = carver.take<float>(parts_of(in));
    bytes = carver.used();
  }

 private:
  // Numbers in the gradient's parts; both sweeps use the same place.
  static int64_t parts_of(const PairwiseBCECuda& in) {
    if (!is_fused(in) || (!in.dx && !in.dy)) return 0;
    if (!uses_hopper(in)) return kSplitBytes / 4;
    int64_t most = 0;
    with_width(padded_width(in), false, [&](auto width, auto) {
      auto count = [&](int rows, int cols) {
        const Plan plan = plan_hopper<HopperTile<Bf16, width()>>(rows, cols, in.d, in.multiprocessors);
        if (plan.splits > 1) most = std::max(most, int64_t(plan.splits) * rows * in.d);
      };
      if (in.dx) count(in.m, in.y.data ? in.k : in.m);
      if (in.dy) count(in.k, in.m);
    });
    return most;
  }
  // dense: a library takes the rows too, and p.z is not for it.
  static Prepared side(Carver& carver, const PairwiseBCECuda& in, int n, const int64_t* ids, bool dense) {
    Prepared p{};
    p.n = n;
    const int multiple = is_chunked_hopper(in) ? WideTile::kBlockN : kRowMultiple;
    p.n_pad = ceil_div(n, multiple) * multiple;
    const int64_t bytes = int64_t(p.n_pad) * padded_width(in) * (is_half(in) ? 2 : 4);
    p.z = carver.take<unsigned char>(bytes);
    if (is_chunked_hopper(in) && dense) p.dense = carver.take<unsigned char>(bytes);
    p.inverse = carver.take<float>(p.n_pad);
    if (uses_hopper(in)) p.factors = carver.take<float>(p.n_pad);
    p.back = carver.take<float>(p.n_pad);
    p.half_norm = carver.take<float>(p.n_pad);
    p.ids = ids;
    if (ids) p.keys = carver.take<uint32_t>(p.n_pad);
    p.layout = layout_of(in);
    return p;
  }
};

Prepare prepare_of(const PairwiseBCECuda& in, const Workspace& work) {
  Prepare prepare{};
  prepare.features[0] = in.x, prepare.features[1] = in.y;
  prepare.more = in.x2, prepare.first = in.x_rows;
  prepare.sides = in.y.data ? 2 : 1;
  prepare.out[0] = work.x, prepare.out[1] = work.y;
  prepare.d = in.d, prepare.width = padded_width(in);
  prepare.normalize = in.normalize;
  prepare.tickets = work.tickets, prepare.n_tickets = work.n_tickets;
  return prepare;
}

Pairs pairs_of(const PairwiseBCECuda& in) {
  return {in.m, in.k, in.shift, in.offset < in.k ? in.offset : in.k, in.exclude_self, false};
}

// A sweep for each gradient that is wanted, and one for the loss alone if none is.
template <class A, class L>
void run(const PairwiseBCECuda& in, Stream stream) {
  const Workspace work(in);
  Sweep sweep{};
  sweep.prepare = prepare_of(in, work);
  sweep.prepares = true;
  sweep.results = {in.constants, in.params, in.loss, in.stats, in.dparams};
  sweep.d = in.d;
  sweep.normalize = in.normalize;
  sweep.loss = true;
  sweep.gradient_times = in.y.data ? 1 : 2;
  sweep.records = work.records;
  sweep.totals = work.totals;
  sweep.pairs = pairs_of(in);
  if (in.dx || !in.dy) {
    sweep.rows = work.x, sweep.cols = work.y;
    sweep.grad = in.dx;
    sweep.tickets = work.tickets;
    L::sweep(sweep, padded_width(in), in.multiprocessors, work.parts, stream);
    sweep.prepares = sweep.loss = false;
  }
  if (in.dy) {
    sweep.rows = work.y, sweep.cols = work.x;
    sweep.side = 1;
    sweep.pairs.transposed = true;
    sweep.grad = in.dy;
    sweep.tickets = work.tickets + 1 + ceil_div(in.m, kSmallestBlockM);
    L::sweep(sweep, padded_width(in), in.multiprocessors, work.parts, stream);
  }
}

template <class A>
void run_half(const PairwiseBCECuda& in, Stream stream) {
  uses_hopper(in) ? run<A, LaunchHopper<A>>(in, stream) : run<A, Launch<A>>(in, stream);
}

template <class F>
void with_chunked(Arithmetic arithmetic, F&& f) {
  if (arithmetic == Arithmetic::kBf16) return f(LaunchChunked<Bf16>{});
  if (arithmetic == Arithmetic::kFp16) return f(LaunchChunked<Fp16>{});
  f(LaunchChunked<Fp32>{});
}

}  // namespace

size_t workspace_bytes(const PairwiseBCECuda& problem) {
  PairwiseBCECuda counted = problem;
  counted.workspace = nullptr;
  return Workspace(counted).bytes;
}

void launch_pairwise_bce(const PairwiseBCECuda& problem, Stream stream) {
  switch (problem.arithmetic) {
    case Arithmetic::kBf16:
      return run_half<Bf16>(problem, stream);
    case Arithmetic::kFp16:
      return run_half<Fp16>(problem, stream);
    case Arithmetic::kTf32:
      return run<Tf32, Launch<Tf32>>(problem, stream);
    case Arithmetic::kFp16x3:
      return run<Fp16x3, Launch<Fp16x3>>(problem, stream);
    case Arithmetic::kFp32:
      break;  // is not fused
  }
}

ChunkedCopies chunked_copies(const PairwiseBCECuda& problem) {
  const Workspace work(problem);
  const auto* start = static_cast<unsigned char*>(problem.workspace);
  auto place = [&](const Prepared& p) {
    return size_t(static_cast<unsigned char*>(is_chunked_hopper(problem) ? p.dense : p.z) - start);
  };
  return {place(work.x), place(work.y), work.x.n_pad, work.y.n_pad, padded_width(problem)};
}

void launch_chunked_prepare(const PairwiseBCECuda& problem, Stream stream) {
  const Workspace work(problem);
  const Prepare prepare = prepare_of(problem, work);
  with_chunked(problem.arithmetic, [&](auto launch) { launch.prepare(prepare, stream); });
}

int chunk_rows(const PairwiseBCECuda& problem) {
  const Workspace work(problem);
  return rows_of_chunk(problem, work.x.n_pad, work.y.n_pad);
}

void launch_chunked_logits(const PairwiseBCECuda& problem, void* g, int row0, int n, Stream stream) {
  const Workspace work(problem);
  ChunkLogits logits{};
  logits.rows = work.x, logits.cols = work.y;
  logits.pairs = pairs_of(problem);
  logits.constants = problem.constants, logits.params = problem.params;
  logits.normalize = problem.normalize;
  logits.width = padded_width(problem);
  logits.row0 = row0, logits.n = n;
  logits.g = g;
  logits.first = row0 == 0;
  logits.records = work.records;
  const bool bf16 = problem.arithmetic == Arithmetic::kBf16;
  if (problem.hopper)
    (bf16 ? LaunchChunkedHopper<Bf16>::logits : LaunchChunkedHopper<Fp16>::logits)(logits, wide_blocks(problem),
                                                                                   stream);
  else
    (bf16 ? LaunchChunkedLogits<Bf16>::logits : LaunchChunkedLogits<Fp16>::logits)(logits, stream);
}

void launch_chunked_terms(const PairwiseBCECuda& problem, float* products, int row0, int n, Stream stream) {
  const Workspace work(problem);
  ChunkTerms terms{};
  terms.rows = work.x, terms.cols = work.y;
  terms.pairs = pairs_of(problem);
  terms.constants = problem.constants, terms.params = problem.params;
  terms.products = products;
  terms.row0 = row0, terms.n = n;
  terms.grad = problem.dx || problem.dy;
  terms.records = work.records + row0 / kChunkWarps;
  LaunchChunkedTerms::terms(terms, stream);
}

void launch_chunked_project(const PairwiseBCECuda& problem, Stream stream) {
  const Workspace work(problem);
  ChunkProjection project{};
  project.rows = work.x, project.cols = work.y;
  project.pairs = pairs_of(problem);
  project.results = {problem.constants, problem.params, problem.loss, problem.stats, problem.dparams};
  project.d = problem.d, project.width = padded_width(problem);
  project.normalize = problem.normalize;
  project.loss = true;
  project.gradient_times = problem.y.data ? 1 : 2;
  project.grad = problem.dx;
  project.records = work.records, project.n_records = work.n_records;
  project.ticket = work.tickets;
  with_chunked(problem.arithmetic, [&](auto launch) { launch.project(project, stream); });
  if (!problem.dy) return;
  project.rows = work.y, project.cols = work.x;
  project.pairs.transposed = true;
  project.loss = false;
  project.grad = problem.dy;
  with_chunked(problem.arithmetic, [&](auto launch) { launch.project(project, stream); });
}

}  // namespace mio_ext
