// SPDX-License-Identifier: Apache-2.0
// From a problem to launches: lays out the workspace and chooses the kernels. No torch here.
#include "pairwise_bce_launch.cuh"

namespace mio_ext {

extern template struct Launch<Bf16>;
extern template struct Launch<Fp16>;
extern template struct Launch<Tf32>;
extern template struct Launch<Fp16x3>;

namespace {

int padded_width(int d) { return d <= 64 ? 64 : d <= 128 ? 128 : 256; }

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
  unsigned* tickets;  // of both sweeps
  int n_tickets;
  float* parts;
  size_t bytes;

  explicit Workspace(const PairwiseBCECuda& in) {
    Carver carver(in.workspace);
    x = side(carver, in, in.m, in.x_ids);
    y = in.y.data ? side(carver, in, in.k, in.y_ids) : x;
    // Splits never make more blocks than twice the slots, if one block a row block does not.
    const int64_t blocks = ceil_div(in.m, kSmallestBlockM), slots = int64_t(in.multiprocessors) * 4;
    records = carver.take<PairSums>(2 * blocks + 2 * slots);
    n_tickets = 2 + ceil_div(in.m, kSmallestBlockM) + ceil_div(in.k, kSmallestBlockM);
    tickets = carver.take<unsigned>(n_tickets);
    const bool grad = in.dx || in.dy;
    parts = carver.take<float>(grad ? kSplitBytes / 4 : 0);
    bytes = carver.used();
  }

 private:
  static Prepared side(Carver& carver, const PairwiseBCECuda& in, int n, const int64_t* ids) {
    Prepared p{};
    p.n = n;
    p.n_pad = ceil_div(n, kRowMultiple) * kRowMultiple;
    const int element = in.arithmetic == Arithmetic::kBf16 || in.arithmetic == Arithmetic::kFp16 ? 2 : 4;
    p.z = carver.take<unsigned char>(int64_t(p.n_pad) * padded_width(in.d) * element);
    p.inverse = carver.take<float>(p.n_pad);
    p.back = carver.take<float>(p.n_pad);
    p.half_norm = carver.take<float>(p.n_pad);
    p.ids = ids;
    return p;
  }
};

template <class A>
void run(const PairwiseBCECuda& in, Stream stream) {
  const Workspace work(in);
  const int width = padded_width(in.d);
  Prepare prepare{};
  prepare.features[0] = in.x, prepare.features[1] = in.y;
  prepare.out[0] = work.x, prepare.out[1] = work.y;
  prepare.d = in.d, prepare.width = width;
  prepare.normalize = in.normalize;
  prepare.tickets = work.tickets, prepare.n_tickets = work.n_tickets;
  Launch<A>::prepare(prepare, in.y.data ? 2 : 1, stream);

  Sweep sweep{};
  sweep.rows = work.x, sweep.cols = work.y;
  sweep.pairs = {in.m, in.k, in.shift, in.offset < in.k ? in.offset : in.k, in.exclude_self, false};
  sweep.results = {in.constants, in.params, in.loss, in.stats, in.dparams};
  sweep.d = in.d;
  sweep.normalize = in.normalize;
  sweep.loss = true;
  sweep.gradient_times = in.y.data ? 1 : 2;
  sweep.grad = in.dx;
  sweep.records = work.records;
  sweep.tickets = work.tickets;
  Launch<A>::sweep(sweep, width, in.multiprocessors, work.parts, stream);
  if (!in.dy) return;
  sweep.rows = work.y, sweep.cols = work.x;
  sweep.pairs.transposed = true;
  sweep.loss = false;
  sweep.grad = in.dy;
  sweep.tickets = work.tickets + 1 + ceil_div(in.m, kSmallestBlockM);
  Launch<A>::sweep(sweep, width, in.multiprocessors, work.parts, stream);
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
      return run<Bf16>(problem, stream);
    case Arithmetic::kFp16:
      return run<Fp16>(problem, stream);
    case Arithmetic::kTf32:
      return run<Tf32>(problem, stream);
    case Arithmetic::kFp16x3:
      return run<Fp16x3>(problem, stream);
  }
}

}  // namespace mio_ext
