// SPDX-License-Identifier: Apache-2.0
// The chunked path's kernels, for rows too wide to keep their gradient in registers. A library multiplies a chunk of
// rows with all columns; terms_kernel turns these products, where they lie, into loss and G, eq. (7)-(8); a library
// multiplies that with the columns and the rows; project_kernel adds the positive pairs and eq. (10). For features of
// 16 bits the first two are one kernel, chunked_logits.cuh.
//
// G carries both sides' norms, so that one matrix serves dx and dy; project_kernel takes the row's own back out.
// Without ids it is 0 for the positive pair, as in the fused path: whose weight, N times that of a negative pair, would
// leave nothing of these in 16 bits.
#pragma once

#include "project.cuh"

namespace mio_ext {

constexpr int kChunkWarps = 8;  // of a block; a warp has a row

struct ChunkTerms {
  Prepared rows, cols;
  Pairs pairs;
  LossParams constants;
  const float* params;
  float* products;  // [n, cols.n_pad], and then G
  int row0, n;      // the chunk
  bool grad;
  PairSums* records;  // [ceil(n / kChunkWarps)]
};

// Four numbers of G side by side.
MIO_DEVICE void store_four(float* to, const float (&g)[4]) {
  *reinterpret_cast<float4*>(to) = {g[0], g[1], g[2], g[3]};
}

// One row of products, and its sums in one thread of the warp that has it.
template <class A, bool kIds>
struct RowTerms {
  static constexpr int kGroup = 4;  // of 128 columns, read at once
  const ChunkTerms& in;
  const Coefficients coefficients;
  const LabelledWeights weights;
  const int row, positive_col, own_col;
  const float inverse = in.rows.inverse[row];
  const int64_t id = kIds ? in.rows.ids[row] : 0;
  ThreadSums positive, negative;
  float distance = 0;

  MIO_DEVICE RowTerms(const ChunkTerms& in, int row)
      : in(in),
        coefficients(read_params(in.constants, in.params)),
        weights(coefficients),
        row(row),
        positive_col(in.pairs.positive(row)),
        own_col(in.pairs.own(row)) {}

  MIO_DEVICE void sweep(float* products) {
    const int lane = threadIdx.x % 32;
    for (int group = 0; group < in.cols.n_pad; group += 128 * kGroup) {
      float4 s[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int col = group + 128 * i + 4 * lane;
        if (col < in.cols.n_pad) s[i] = *reinterpret_cast<const float4*>(products + col);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int col = group + 128 * i + 4 * lane;
        if (col >= in.cols.n_pad) continue;
        float g[4] = {s[i].x, s[i].y, s[i].z, s[i].w};
        four(g, col);
        if (in.grad) store_four(products + col, g);
      }
    }
  }

  MIO_DEVICE void total(double (&sums)[kSums]) const {
    PairSums out;
    positive.to(out.positive);
    negative.to(out.negative);
    out.negative.count = -out.positive.count;  // of all pairs, which project_kernel counts
    out.distance = distance;
    to_array(out, sums);
  }

 private:
  MIO_DEVICE void four(float (&s)[4], int col0) {
    const float4 factors = *reinterpret_cast<const float4*>(in.cols.inverse + col0);
    const float factor[4] = {factors.x, factors.y, factors.z, factors.w};
    float relu_p = 0, relu_n = 0, p_p = 0, p_n = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int col = col0 + i;
      const float both = factor[i] * inverse, product = s[i] * both;
      bool keep = col < in.cols.n && col != own_col, same = false;
      if constexpr (kIds) {
        same = keep && in.cols.ids[col] == id;
      } else {
        keep = keep && col != positive_col;
      }
      const Term term(same ? -(product * coefficients.p + coefficients.bias)
                           : product * coefficients.n + coefficients.bias);
      s[i] = 0;
      if (same) {
        relu_p += term.relu, p_p = times_1p(p_p, term.e);
        positive.add(term, product);
        distance += in.rows.half_norm[row] + in.cols.half_norm[col] - product;
        s[i] = (term.sigmoid * weights.p + weights.l) * both * A::kLift;
      } else if (keep) {
        relu_n += term.relu, p_n = times_1p(p_n, term.e);
        negative.add(term, product);
        s[i] = term.sigmoid * (kIds ? weights.n : 1.0f) * both * A::kLift;
      }
    }
    if constexpr (kIds) {
      positive.softplus.add(relu_p, p_p);
    }
    negative.softplus.add(relu_n, p_n);
  }
};

template <int kWarps>
MIO_DEVICE void write_record(const double (&sums)[kSums], PairSums* to, bool add = false) {
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  auto* total = reinterpret_cast<PairSums*>(scratch + kWarps * kSums);
  block_total<kWarps>(sums, scratch, total);
  if (threadIdx.x < kSums) fields(to)[threadIdx.x] = fields(total)[threadIdx.x] + (add ? fields(to)[threadIdx.x] : 0);
}
constexpr int kChunkShared = (kChunkWarps + 1) * int(sizeof(PairSums)) + 8;  // what write_record() takes, and a flag

// Grid: [ceil(n / kChunkWarps)].
template <class A, bool kIds>
__global__ void __launch_bounds__(32 * kChunkWarps) terms_kernel(const ChunkTerms in) {
  const int local = blockIdx.x * kChunkWarps + threadIdx.x / 32;
  double sums[kSums] = {};
  if (local < in.n) {  // the same for a whole warp
    RowTerms<A, kIds> terms(in, in.row0 + local);
    terms.sweep(in.products + int64_t(local) * in.cols.n_pad);
    terms.total(sums);
  }
  write_record<kChunkWarps>(sums, in.records + blockIdx.x);
}

struct ChunkProjection {
  Prepared rows, cols;
  Pairs pairs;
  Results results;
  int d, width;
  bool normalize;
  bool loss;             // add up the loss too
  float gradient_times;  // as in Sweep
  float* grad;           // [n, d] the library's product, in place; or nullptr
  PairSums* records;     // [n_records], the last of which are written here
  int n_records;
  unsigned* ticket;  // zero
};

// A warp finishes a row, eight features a lane at a time.
template <class A, bool kIds>
MIO_DEVICE void project_row(const ChunkProjection& in, const Coefficients& coefficients, int row, PairSums& out) {
  constexpr int kStep = 8 * kWideRowLanes;
  const int first = 8 * (threadIdx.x % kWideRowLanes);
  const int column = kIds ? -1 : in.pairs.positive(row);
  const float inverse = in.rows.inverse[row], y_inverse = column < 0 ? 0 : in.cols.inverse[column];
  auto x_at = [&](float (&v)[8], int f) { unit_eight<A>(v, in.rows, in.rows.layout, row, in.width, f, inverse); };
  auto y_at = [&](float (&v)[8], int f) { unit_eight<A>(v, in.cols, in.cols.layout, column, in.width, f, y_inverse); };
  float x[8], y[8];
  PositivePair pair;
  out.negative.count += in.cols.n - (column >= 0) - (in.pairs.own(row) >= 0);
  if constexpr (!kIds) {
    if (column >= 0) {
      for (int f = first; f < in.width; f += kStep) x_at(x, f), y_at(y, f), pair.add(x, y);
      pair.sum_up<kWideRowLanes>();
      pair.to(out, coefficients);
    }
  }
  if (!in.grad) return;
  const float back = in.rows.back[row] * in.gradient_times;
  const float times = (kIds ? LabelledWeights::unit_of(coefficients) : coefficients.weight_n) / (A::kLift * inverse);
  const bool aligned = rows_are_aligned(in.grad, in.d);
  float* grad = in.grad + int64_t(row) * in.d;
  auto load_grad = [&](float (&g)[8], int f) {
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = 0;
    aligned ? add_row_eight<true>(g, grad, f, in.d) : add_row_eight<false>(g, grad, f, in.d);
  };
  float g[8], dot = 0;
  for (int f = first; f < in.d; f += kStep) {
    load_grad(g, f), x_at(x, f);
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] *= times;
    if (column >= 0) y_at(y, f), pair.add_gradient(g, x, y, coefficients);
    dot += dot_eight(g, x);
    store_row_eight(grad, f, in.d, aligned, g);
  }
  dot = in.normalize ? sum_lanes<kWideRowLanes>(dot) : 0;
  for (int f = first; f < in.d; f += kStep) {
    load_grad(g, f), x_at(x, f);
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = (g[i] - dot * x[i]) * back;  // (10)
    store_row_eight(grad, f, in.d, aligned, g);
  }
}

// Grid: [ceil(rows.n / kChunkWarps)].
template <class A, bool kIds>
__global__ void __launch_bounds__(32 * kChunkWarps) project_kernel(const ChunkProjection in) {
  const Coefficients coefficients(read_params(in.results.constants, in.results.params));
  const int row = blockIdx.x * kChunkWarps + threadIdx.x / 32;
  PairSums out;
  if (row < in.rows.n) project_row<A, kIds>(in, coefficients, row, out);
  if (!in.loss) return;
  if (threadIdx.x % 32 != 0) out = PairSums();  // all lanes have the same
  double sums[kSums];
  to_array(out, sums);
  write_record<kChunkWarps>(sums, in.records + in.n_records - gridDim.x + blockIdx.x);
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  auto* total = reinterpret_cast<PairSums*>(scratch + kChunkWarps * kSums);
  if (last_to_arrive(in.ticket, gridDim.x, reinterpret_cast<unsigned*>(total + 1)))
    sum_records<kChunkWarps>(in.records, in.n_records, in.results, scratch, total);
}

}  // namespace mio_ext
