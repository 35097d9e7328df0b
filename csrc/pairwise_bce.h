// SPDX-License-Identifier: Apache-2.0
// One problem of the pairwise_bce family, eq. (11)-(12) of mio_ext/reference.py, from host to kernel.
// No torch header here: the CMake library and device code include this file too.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MIO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MIO_HOST_DEVICE inline
#endif

namespace mio_ext {

// What a pass sums up, over ordered pairs of one class (positive or negative).
// t is the logit whose softplus is the loss: -logit on positive pairs, logit on negative pairs.
struct ClassSums {
  double count = 0;
  double softplus = 0;      // softplus(t)
  double product = 0;       // x_i . y_j
  double sigmoid = 0;       // sigmoid(t)
  double sigmoid_prod = 0;  // sigmoid(t) * x_i . y_j

  MIO_HOST_DEVICE void add(const ClassSums& o, double times) {
    count += times * o.count;
    softplus += times * o.softplus;
    product += times * o.product;
    sigmoid += times * o.sigmoid;
    sigmoid_prod += times * o.sigmoid_prod;
  }
};

struct PairSums {
  ClassSums positive, negative;
  double distance = 0;  // |x_i - y_j|^2 / 2 over positive pairs

  MIO_HOST_DEVICE void add(const PairSums& o, double times) {
    positive.add(o.positive, times);
    negative.add(o.negative, times);
    distance += times * o.distance;
  }

  // The fields of reference.PairStats. A mean over no pairs is NaN. t is minus the logit on positive pairs.
  MIO_HOST_DEVICE void statistics(double out[8]) const {
    out[0] = positive.count;
    out[1] = negative.count;
    out[2] = positive.softplus / positive.count;
    out[3] = negative.softplus / negative.count;
    out[4] = positive.product / positive.count;
    out[5] = negative.product / negative.count;
    out[6] = 1 - positive.sigmoid / positive.count;
    out[7] = negative.sigmoid / negative.count;
  }
};

// (a_p, a_n, b, w_p, w_n, w_l) of eq. (11)-(12).
struct LossParams {
  double scale_p, scale_n, bias;
  double weight_p, weight_n, weight_l;

  MIO_HOST_DEVICE double loss(const PairSums& s) const {
    return weight_p * s.positive.softplus + weight_n * s.negative.softplus + weight_l * s.distance;
  }

  // d loss / d (a_p, a_n, b, w_p, w_n, w_l)
  MIO_HOST_DEVICE void gradient(const PairSums& s, double out[6]) const {
    out[0] = -weight_p * s.positive.sigmoid_prod;
    out[1] = weight_n * s.negative.sigmoid_prod;
    out[2] = weight_n * s.negative.sigmoid - weight_p * s.positive.sigmoid;
    out[3] = s.positive.softplus;
    out[4] = s.negative.softplus;
    out[5] = s.distance;
  }
};

// T is the type of the arithmetic: float, or double for float64 inputs.
template <typename T>
struct PairwiseBCE {
  const T* x;            // [M, D] rows, contiguous, or the first x_rows of them
  const T* x2;           // the others; nullptr: x has all
  const T* y;            // [K, D] columns, contiguous; nullptr: y = x, and dx holds both roles' gradient
  const int64_t* x_ids;  // [M], equal ids are positive pairs; nullptr: positives lie on a diagonal
  const int64_t* y_ids;  // [K]
  int64_t m, k, d, x_rows;
  int64_t shift;      // positive column of row i: offset + (i + shift) mod M, if below K
  int64_t offset;     // own column of row i: offset + i
  bool exclude_self;  // a row and its own column are no pair
  bool bfloat16;      // x and y hold bfloat16 values: their products may be taken in that type
  bool normalize;     // eq. (1) on rows and columns, eq. (10) on the gradients
  LossParams params;
  T* dx;  // [M, D], contiguous; nullptr: not wanted
  T* dy;  // [K, D]

  const T* x_row(int64_t i) const { return x2 != nullptr && i >= x_rows ? x2 + (i - x_rows) * d : x + i * d; }
};

constexpr double kNormEps = 1e-12;

}  // namespace mio_ext
