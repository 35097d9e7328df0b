// SPDX-License-Identifier: Apache-2.0
// CPU kernel of the pairwise_bce family. Fused: the logits of a tile of rows x columns, their loss,
// sigmoid and statistics, and the tile's share of both gradients; a tile of logits lives only in the
// cache of the thread that works on it.
//
// This file is compiled once per instruction set: the including file sets the target and defines
// MIO_ISA (a namespace), MIO_VECTOR_BYTES and the register block MIO_MR rows x MIO_NV vectors. All
// arithmetic is in GCC vector extensions, so the same text serves AVX-512, AVX2, NEON and plain SSE2.
// It may include no standard header: an inline function instantiated here would carry this target's
// instructions into every other translation unit.

namespace mio_ext {
namespace MIO_ISA {

constexpr double kLn2 = 0.693147180559945309417232121458;

template <typename T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(MIO_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(MIO_VECTOR_BYTES)));
  using Lane = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kExponentBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kMinExponent = -69.0f;
  static constexpr int kExpTerms = 7;  // of the Taylor series on [-ln(2)/2, ln(2)/2]: relative error 5e-9
  // ln(2) in two parts; the first has so few bits that its product with the exponent is exact.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440054690583e-4f;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(MIO_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(MIO_VECTOR_BYTES)));
  using Lane = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kExponentBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMinExponent = -690.0;
  static constexpr int kExpTerms = 13;
  static constexpr double kLn2High = 0.69314718036912381649, kLn2Low = 1.9082149292705877000e-10;
};

template <typename T>
constexpr int kWidth = MIO_VECTOR_BYTES / sizeof(T);
// Columns of one register block; packed panels have this width.
template <typename T>
constexpr int kPanel = kWidth<T> * MIO_NV;

template <typename T>
inline typename Simd<T>::Vec load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Vec*>(p);
}
template <typename T>
inline typename Simd<T>::Int load_ids(const typename Simd<T>::Lane* p) {
  return *reinterpret_cast<const typename Simd<T>::Int*>(p);
}
template <typename T>
inline void store(T* p, typename Simd<T>::Vec v) {
  *reinterpret_cast<typename Simd<T>::Vec*>(p) = v;
}

// ---------------------------------------------------------------- matrix products

// c [MIO_MR, NV vectors] (+)= a b over k, all accumulators in registers. They start at zero and meet c
// at the end: a sum of sums over tiles, which rounds less than one long sum.
// a(m, k) = a[m * lda + k], or a[k * lda + m] where kTransA.
template <typename T, int NV, bool kTransA, bool kAccumulate>
inline void register_block(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  using Vec = typename Simd<T>::Vec;
  constexpr int W = kWidth<T>;
  Vec acc[MIO_MR][NV];
#pragma GCC unroll 32
  for (int m = 0; m < MIO_MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[m][v] = Vec{};
  for (int64_t i = 0; i < k; ++i) {
    Vec bv[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) bv[v] = load(b + i * ldb + v * W);
#pragma GCC unroll 32
    for (int m = 0; m < MIO_MR; ++m) {
      const T av = kTransA ? a[i * lda + m] : a[m * lda + i];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] += av * bv[v];
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < MIO_MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      T* at = c + m * ldc + v * W;
      store(at, kAccumulate ? load(at) + acc[m][v] : acc[m][v]);
    }
}

// c [m, n] (+)= a b. m is rounded up to MIO_MR (the buffers have room), n is a multiple of the vector
// width. Panel p of b, kPanel columns wide, starts at b + p * b_panel and has rows of ldb elements.
template <typename T, bool kTransA, bool kAccumulate>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t b_panel, int64_t ldb, T* c,
          int64_t ldc) {
  const int64_t a_step = kTransA ? 1 : lda;
  int64_t n0 = 0;
  for (; n0 + kPanel<T> <= n; n0 += kPanel<T>, b += b_panel)
    for (int64_t m0 = 0; m0 < m; m0 += MIO_MR)
      register_block<T, MIO_NV, kTransA, kAccumulate>(k, a + m0 * a_step, lda, b, ldb, c + m0 * ldc + n0, ldc);
  for (; n0 < n; n0 += kWidth<T>, b += kWidth<T>)
    for (int64_t m0 = 0; m0 < m; m0 += MIO_MR)
      register_block<T, 1, kTransA, kAccumulate>(k, a + m0 * a_step, lda, b, ldb, c + m0 * ldc + n0, ldc);
}

// ---------------------------------------------------------------- the scalar term, vectorised

// 1 / i!
template <int N>
struct ExpSeries {
  double c[N + 1];
  constexpr ExpSeries() : c{1} {
    for (int i = 1; i <= N; ++i) c[i] = c[i - 1] / i;
  }
};

// exp(u) for u <= 0. NaN stays NaN. The clamp keeps every later product clear of denormals.
template <typename T>
inline typename Simd<T>::Vec exp_nonpositive(typename Simd<T>::Vec u) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  u = u < S::kMinExponent ? Vec{} + S::kMinExponent : u;
  const Vec rounded = u * T(1 / kLn2) + S::kRound;
  const Vec n = rounded - S::kRound;
  const Vec f = (u - n * S::kLn2High) - n * S::kLn2Low;
  constexpr ExpSeries<S::kExpTerms> series;
  Vec poly = Vec{} + T(series.c[S::kExpTerms]);
#pragma GCC unroll 16
  for (int i = S::kExpTerms - 1; i >= 0; --i) poly = poly * f + T(series.c[i]);
  // The low bits of `rounded` are n; as an exponent field they make 2^n.
  const Int power = (reinterpret_cast<Int>(rounded) + S::kExponentBias) << S::kMantissaBits;
  return poly * reinterpret_cast<Vec>(power);
}

// softplus and sigmoid of t from one exponential: with e = exp(-|t|),
// softplus(t) = max(t, 0) + log1p(e), sigmoid(t) = 1/(1+e) or e/(1+e).
template <typename T>
struct Term {
  using Vec = typename Simd<T>::Vec;
  Vec e, relu, sigmoid;

  explicit Term(Vec t) {
    const Vec zero{};
    relu = t < zero ? zero : t;  // NaN stays NaN
    e = exp_nonpositive<T>(t < zero ? t : -t);
    const Vec r = T(1) / (T(1) + e);
    sigmoid = t < zero ? e * r : r;
  }
  // Zero outside the mask.
  Term(const Term& o, typename Simd<T>::Int mask) {
    const Vec zero{};
    e = mask ? o.e : zero;
    relu = mask ? o.relu : zero;
    sigmoid = mask ? o.sigmoid : zero;
  }
};

// Sums of terms. log1p is taken once per many of them: 1 + p is the product of the factors 1 + e, and p,
// kept without its 1, loses nothing where every e is tiny.
template <typename T>
struct TermSums {
  using Vec = typename Simd<T>::Vec;
  Vec p{}, relu{}, product{}, sigmoid{}, sigmoid_prod{};

  void add(const Term<T>& term, Vec s) {
    p = p * term.e + (p + term.e);
    relu += term.relu;
    product += s;
    sigmoid += term.sigmoid;
    sigmoid_prod += term.sigmoid * s;
  }

  // Adds up the lanes in double. Up to 64 factors a lane and 8 lanes a logarithm: at most 2^512.
  void flush(ClassSums& sums) {
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      sums.softplus += double(relu[lane]);
      sums.product += double(product[lane]);
      sums.sigmoid += double(sigmoid[lane]);
      sums.sigmoid_prod += double(sigmoid_prod[lane]);
    }
    for (int lane = 0; lane < kWidth<T>; lane += 8) {
      double q = 0;
      for (int l = lane; l < lane + 8 && l < kWidth<T>; ++l) q = q * double(p[l]) + (q + double(p[l]));
      sums.softplus += __builtin_log1p(q);
    }
    *this = TermSums{};
  }
};
constexpr int kFactorsPerLog = 64;

// The numbers a tile needs, in the arithmetic type.
// Gradient coefficients are divided by `unit`, the largest of them, which comes back in finish():
// so a tiny weight 1/N^2 flushes nothing.
template <typename T>
struct TileParams {
  T scale_p, scale_n, bias;
  T grad_p, grad_n, grad_l;
  T unit;

  explicit TileParams(const LossParams& p) {
    auto abs = [](double v) { return v < 0 ? -v : v; };
    scale_p = T(p.scale_p);
    scale_n = T(p.scale_n);
    bias = T(p.bias);
    const double gp = p.weight_p * p.scale_p, gn = p.weight_n * p.scale_n;
    double u = abs(gp);
    if (abs(gn) > u) u = abs(gn);
    if (abs(p.weight_l) > u) u = abs(p.weight_l);
    const double inverse = u == 0 ? 0 : 1 / u;
    grad_p = T(-gp * inverse);
    grad_n = T(gn * inverse);
    grad_l = T(-p.weight_l * inverse);
    unit = T(u);
  }
};

// A tile whose pairs are all negative: s [rows, cols] becomes dL/ds / unit in place.
template <typename T, bool kGrad>
void negative_tile(const TileParams<T>& p, int64_t rows, int64_t cols, T* s, int64_t lds, ClassSums& sums) {
  using Vec = typename Simd<T>::Vec;
  constexpr int W = kWidth<T>;
  TermSums<T> acc;
  int factors = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; j += W) {
      T* at = s + i * lds + j;
      const Vec v = load(at);
      const Term<T> term(v * p.scale_n + p.bias);
      acc.add(term, v);
      if (kGrad) store(at, term.sigmoid * p.grad_n);
      if (++factors == kFactorsPerLog) {
        acc.flush(sums);
        factors = 0;
      }
    }
  acc.flush(sums);
  sums.count += double(rows) * double(cols);
}

// Where a tile lies, for tiles that a diagonal, a ragged edge or ids touch. All in tile coordinates.
template <typename T>
struct TileLabels {
  using Lane = typename Simd<T>::Lane;
  const Lane* x_ids;  // of the tile's rows, or nullptr
  const Lane* y_ids;  // of the tile's columns, readable up to a whole vector
  const T* x_norm2;   // |x_i|^2 of the tile's rows
  const T* y_norm2;
  int64_t cols;  // columns of the tile that exist

  // Tile column of row i's positive and of its own column; out of range: not in this tile.
  Lane positive(int64_t i) const { return in_tile(offset + (row0 + i + shift) % m); }
  Lane self(int64_t i) const { return exclude_self ? in_tile(offset + row0 + i) : Lane(-1); }

  int64_t row0, col0, m, shift, offset;
  bool exclude_self;

 private:
  Lane in_tile(int64_t column) const {
    const int64_t j = column - col0;
    return j >= 0 && j < cols ? Lane(j) : Lane(-1);
  }
};

template <typename T>
struct LabelledSums {
  using Int = typename Simd<T>::Int;
  TermSums<T> positive, negative;
  typename Simd<T>::Vec distance{};
  Int n_positive{}, n_negative{};  // a true lane counts -1

  void flush(PairSums& sums) {
    positive.flush(sums.positive);
    negative.flush(sums.negative);
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      sums.distance += double(distance[lane]);
      sums.positive.count -= double(n_positive[lane]);
      sums.negative.count -= double(n_negative[lane]);
    }
    *this = LabelledSums{};
  }
};

// A tile with positives, self pairs, missing columns or ids.
template <typename T, bool kGrad>
void labelled_tile(const TileParams<T>& p, const TileLabels<T>& labels, int64_t rows, T* s, int64_t lds,
                   PairSums& sums) {
  using Vec = typename Simd<T>::Vec;
  using Int = typename Simd<T>::Int;
  using Lane = typename Simd<T>::Lane;
  constexpr int W = kWidth<T>;
  const Vec zero{};
  Int iota{};
  for (int lane = 0; lane < W; ++lane) iota[lane] = lane;
  LabelledSums<T> acc;
  int factors = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const Lane positive = labels.x_ids ? Lane(-1) : labels.positive(i);
    const Lane self = labels.self(i);
    for (int64_t j = 0; j < labels.cols; j += W) {
      T* at = s + i * lds + j;
      const Int column = iota + Lane(j);
      const Int keep = (column != self) & (column < Lane(labels.cols));
      const Int same = labels.x_ids ? Int(load_ids<T>(labels.y_ids + j) == labels.x_ids[i]) : Int(column == positive);
      const Int is_pos = keep & same, is_neg = keep & ~same;
      const Vec v = load(at);
      const Term<T> term(is_pos ? -(v * p.scale_p + p.bias) : v * p.scale_n + p.bias);
      acc.positive.add(Term<T>(term, is_pos), is_pos ? v : zero);
      acc.negative.add(Term<T>(term, is_neg), is_neg ? v : zero);
      acc.n_positive += is_pos;
      acc.n_negative += is_neg;
      const Vec half_norms = (labels.x_norm2[i] + load(labels.y_norm2 + j)) * T(0.5);
      acc.distance += is_pos ? half_norms - v : zero;
      if (kGrad) {
        const Vec g_pos = term.sigmoid * p.grad_p + p.grad_l;
        store(at, is_pos ? g_pos : (is_neg ? term.sigmoid * p.grad_n : zero));
      }
      if (++factors == kFactorsPerLog) {
        acc.flush(sums);
        factors = 0;
      }
    }
  }
  acc.flush(sums);
}

// ---------------------------------------------------------------- one pass over all tiles

// A set of rows in the two layouts the products want, normalised, plus what eq. (10) needs later.
template <typename T>
struct Packed {
  int64_t n, d, ld;                    // ld: row stride, an odd number of vectors, so that rows do not share cache sets
  Buffer<T> rows;                      // [n up to block, ld], zero padded
  Buffer<T> panels;                    // [n / kPanel up][d][kPanel]: the transpose, in panels; columns only
  Buffer<T> inverse;                   // [n] 1/max(|z|, eps), 0 where the gradient is 0; 1 without normalisation
  Buffer<T> norm2;                     // [n up to block] |row|^2 after normalisation
  Buffer<T> gradient;                  // [n up to block, ld] dL/drow / unit
  Buffer<typename Simd<T>::Lane> ids;  // [n up to block]

  void allocate(int64_t count, int64_t dim, int64_t block, bool columns, bool grad, bool with_ids) {
    n = count, d = dim;
    const int64_t vectors = (d + kWidth<T> - 1) / kWidth<T>;
    ld = (vectors | 1) * kWidth<T>;
    const int64_t padded = (n + block - 1) / block * block;
    rows.allocate(padded * ld);
    if (columns) panels.allocate(padded * d);
    inverse.allocate(padded);
    norm2.allocate(padded);
    if (grad) gradient.allocate(padded * ld);
    if (with_ids) ids.allocate(padded);
  }

  // Rows [first, first + kPanel) of z [n, d].
  void pack(const T* z, int64_t first, bool normalize) {
    for (int64_t i = first; i < first + kPanel<T>; ++i) {
      T* row = rows.data() + i * ld;
      const T* in = z + i * d;
      double sum = 0;
      if (i < n) sum = sum_of_squares(in);
      const double norm = __builtin_sqrt(sum);
      const double scale = !normalize ? 1 : 1 / (norm < kNormEps ? kNormEps : norm);
      inverse.data()[i] = normalize && norm <= kNormEps ? T(0) : T(scale);
      norm2.data()[i] = T(sum * scale * scale);
      for (int64_t c = 0; c < d; ++c) row[c] = i < n ? T(in[c] * scale) : T(0);
      for (int64_t c = d; c < ld; ++c) row[c] = 0;
      if (gradient.data())
        for (int64_t c = 0; c < ld; ++c) gradient.data()[i * ld + c] = 0;
    }
    if (!panels.data()) return;
    T* panel = panels.data() + first * d;
    const T* row = rows.data() + first * ld;
    for (int64_t c = 0; c < d; ++c)
      for (int64_t i = 0; i < kPanel<T>; ++i) panel[c * kPanel<T> + i] = row[i * ld + c];
  }

  double sum_of_squares(const T* in) const {
    double lanes[8] = {};
    int64_t c = 0;
    for (; c + 8 <= d; c += 8)
      for (int l = 0; l < 8; ++l) lanes[l] += double(in[c + l]) * double(in[c + l]);
    for (; c < d; ++c) lanes[c % 8] += double(in[c]) * double(in[c]);
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
  }

  // Eq. (10): out [d] = unit inverse (g - (row . g) row), for row i.
  void finish(int64_t i, T unit, bool normalize, T* out) const {
    const T* g = gradient.data() + i * ld;
    const T* row = rows.data() + i * ld;
    T along = 0;
    if (normalize) {
      T lanes[16] = {};
      for (int64_t c = 0; c < ld; c += kWidth<T>)
        for (int l = 0; l < kWidth<T>; ++l) lanes[l] += g[c + l] * row[c + l];
      for (T lane : lanes) along += lane;
    }
    const T scale = unit * inverse.data()[i];
    for (int64_t c = 0; c < d; ++c) out[c] = scale * (g[c] - along * row[c]);
  }
};

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

template <typename T>
class Pass {
 public:
  explicit Pass(const PairwiseBCE<T>& problem)
      : in_(problem),
        symmetric_(problem.y == nullptr),
        params_(problem.params),
        row_block_(block_size(problem.m, problem.d)),
        col_block_(block_size(symmetric_ ? problem.m : problem.k, problem.d)) {
    const bool ids = problem.x_ids != nullptr;
    x_.allocate(in_.m, in_.d, row_block_, symmetric_, in_.dx != nullptr, ids);
    if (!symmetric_) y_.allocate(in_.k, in_.d, col_block_, true, in_.dy != nullptr, ids);
  }

  // Row blocks own the sums of their tiles: added in the order of the schedule, not of the threads.
  PairSums run(int threads, const Parallel& parallel) {
    each_panel(threads, parallel, x_, in_.x);
    if (!symmetric_) each_panel(threads, parallel, y_, in_.y);
    if (in_.x_ids) {
      const Ranks ranks(in_.x_ids, in_.m, in_.y_ids, symmetric_ ? 0 : in_.k);
      for (int64_t i = 0; i < in_.m; ++i) x_.ids.data()[i] = ranks(in_.x_ids[i]);
      for (int64_t j = 0; !symmetric_ && j < in_.k; ++j) y_.ids.data()[j] = ranks(in_.y_ids[j]);
    }

    const int64_t row_blocks = (in_.m + row_block_ - 1) / row_block_;
    const int64_t col_blocks = (columns().n + col_block_ - 1) / col_block_;
    std::vector<PairSums> sums(row_blocks);
    Schedule schedule(row_blocks, col_blocks, symmetric_);
    parallel(threads, [&](int) {
      Buffer<T> logits;
      logits.allocate(row_block_ * tile_ld());
      for (;;) {
        const Schedule::Task task = schedule.take();
        if (task.round < 0) break;
        if (task.row < row_blocks && task.col < col_blocks)
          tile(task.row * row_block_, task.col * col_block_, logits.data(), sums[task.row]);
        schedule.done(task);
      }
    });
    each_row(threads, parallel, x_, in_.dx);
    if (!symmetric_) each_row(threads, parallel, y_, in_.dy);

    PairSums total;
    for (const PairSums& s : sums) total.add(s, 1);
    return total;
  }

 private:
  // From the size alone, so that the bits do not depend on the number of threads: enough blocks to keep
  // threads busy, and large ones where the operands outgrow the last cache (measured, docs/performance.md).
  static int64_t block_size(int64_t n, int64_t d) {
    if (n <= 256) return 32;
    if (n <= 512) return 64;
    return n >= 4096 && n * d > (int64_t{1} << 20) ? 256 : 128;
  }
  static_assert(32 % kPanel<T> == 0 && kPanel<T> % MIO_MR == 0,
                "blocks are whole panels, panels whole register blocks");

  static constexpr int64_t kFeatures = 128;

  int64_t tile_ld() const { return col_block_ + kWidth<T>; }  // an odd number of vectors
  Packed<T>& columns() { return symmetric_ ? x_ : y_; }

  void each_panel(int threads, const Parallel& parallel, Packed<T>& packed, const T* z) {
    const int64_t padded = (packed.n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
    std::atomic<int64_t> next{0};
    parallel(threads, [&](int) {
      for (int64_t i; (i = next.fetch_add(kPanel<T>)) < padded;) packed.pack(z, i, in_.normalize);
    });
  }

  // Where y = x every row is in both roles, and G is symmetric: twice the row gradient, eq. (9).
  void each_row(int threads, const Parallel& parallel, const Packed<T>& packed, T* out) {
    if (!out) return;
    std::atomic<int64_t> next{0};
    constexpr int64_t kRows = 64;
    parallel(threads, [&](int) {
      for (int64_t first; (first = next.fetch_add(kRows)) < packed.n;)
        for (int64_t i = first; i < packed.n && i < first + kRows; ++i)
          packed.finish(i, params_.unit * (symmetric_ ? 2 : 1), in_.normalize, out + i * packed.d);
    });
  }

  // Rows [row0, row0 + row_block) against columns [col0, col0 + col_block).
  void tile(int64_t row0, int64_t col0, T* s, PairSums& sums) {
    Packed<T>& cols = columns();
    const int64_t d = in_.d, lds = tile_ld();
    const int64_t m = in_.m - row0 < row_block_ ? in_.m - row0 : row_block_;
    const int64_t n = cols.n - col0 < col_block_ ? cols.n - col0 : col_block_;
    const int64_t n_padded = (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
    // s = x yT, summed over the features in parts, for the same reason as in register_block()
    for (int64_t c = 0; c < d; c += kFeatures) {
      auto product = c == 0 ? gemm<T, false, false> : gemm<T, false, true>;
      product(m, n_padded, d - c < kFeatures ? d - c : kFeatures, x_.rows.data() + row0 * x_.ld + c, x_.ld,
              cols.panels.data() + col0 * d + c * kPanel<T>, kPanel<T> * d, kPanel<T>, s, lds);
    }
    // s becomes the loss's derivative
    const bool diagonal = symmetric_ && row0 == col0;
    PairSums tile_sums;
    const bool grad = in_.dx || in_.dy;
    grad ? terms<true>(row0, col0, m, n, s, tile_sums) : terms<false>(row0, col0, m, n, s, tile_sums);
    // y = x: a tile off the diagonal stands for its mirror image too.
    sums.add(tile_sums, symmetric_ && !diagonal ? 2 : 1);
    // dx += s y, dy += sT x
    if (in_.dx)
      gemm<T, false, true>(m, cols.ld, n, s, lds, cols.rows.data() + col0 * cols.ld, kPanel<T>, cols.ld,
                           x_.gradient.data() + row0 * x_.ld, x_.ld);
    if (cols.gradient.data() && !diagonal)
      gemm<T, true, true>(n, x_.ld, m, s, lds, x_.rows.data() + row0 * x_.ld, kPanel<T>, x_.ld,
                          cols.gradient.data() + col0 * cols.ld, cols.ld);
  }

  template <bool kGrad>
  void terms(int64_t row0, int64_t col0, int64_t rows, int64_t cols, T* s, PairSums& sums) {
    const Packed<T>& columns = this->columns();
    if (!in_.x_ids && cols % kWidth<T> == 0 && !diagonals_touch(row0, col0, rows, cols))
      return negative_tile<T, kGrad>(params_, rows, cols, s, tile_ld(), sums.negative);
    TileLabels<T> labels;
    labels.x_ids = in_.x_ids ? x_.ids.data() + row0 : nullptr;
    labels.y_ids = in_.x_ids ? columns.ids.data() + col0 : nullptr;
    labels.x_norm2 = x_.norm2.data() + row0;
    labels.y_norm2 = columns.norm2.data() + col0;
    labels.cols = cols;
    labels.row0 = row0, labels.col0 = col0;
    labels.m = in_.m, labels.shift = in_.shift, labels.offset = in_.offset;
    labels.exclude_self = in_.exclude_self;
    labelled_tile<T, kGrad>(params_, labels, rows, s, tile_ld(), sums);
  }

  // Does the diagonal of positives or of self pairs cross this tile?
  bool diagonals_touch(int64_t row0, int64_t col0, int64_t rows, int64_t cols) const {
    auto overlap = [&](int64_t first, int64_t count) {  // columns [first, first + count)
      return first < col0 + cols && col0 < first + count;
    };
    if (in_.exclude_self && overlap(in_.offset + row0, rows)) return true;
    const int64_t first = (row0 + in_.shift) % in_.m;
    const int64_t until_wrap = rows < in_.m - first ? rows : in_.m - first;
    return overlap(in_.offset + first, until_wrap) || (rows > until_wrap && overlap(in_.offset, rows - until_wrap));
  }

  const PairwiseBCE<T>& in_;
  const bool symmetric_;
  const TileParams<T> params_;
  const int64_t row_block_, col_block_;
  Packed<T> x_, y_;
};

template <typename T>
PairSums run(const PairwiseBCE<T>& problem, int threads, const Parallel& parallel) {
  return Pass<T>(problem).run(threads, parallel);
}

}  // namespace MIO_ISA
}  // namespace mio_ext

#undef MIO_ISA
#undef MIO_VECTOR_BYTES
#undef MIO_MR
#undef MIO_NV
