// SPDX-License-Identifier: Apache-2.0
// What the linear term makes of a row: the differences to its positives, eq. (9), and their squares, eq. (12). Both are
// made of differences of rows, never of differences of sums: where positives agree, nothing is left of either.

namespace mio_ext {
namespace MIO_ISA {

template <typename T>
double sum_of_lanes(typename Simd<T>::Vec v) {
  double sum = 0;
  for (int lane = 0; lane < kWidth<T>; ++lane) sum += double(v[lane]);
  return sum;
}

// Σ u(c) v(c) over vectors of features.
template <typename T, class U, class V>
double dot(int64_t d, const U& u, const V& v) {
  typename Simd<T>::Vec lanes{};
  for (int64_t c = 0; c < d; c += kWidth<T>) lanes += u(c) * v(c);
  return sum_of_lanes<T>(lanes);
}

// The rows of every id, as sums over the distances from their mean m: for rows y_j of one id and any x
//   Σ (x - y_j)      = count (x - m) - rest         rest = Σ (y_j - m), which m's rounding leaves
//   Σ |x - y_j|^2/2  = count |x - m|^2/2 - (x - m) . rest + spread
template <typename T>
class Classes {
 public:
  struct Class {
    T count;
    const T *mean, *rest;  // [ld]
    double spread;         // Σ |y_j - m|^2/2
  };

  template <class Layout>
  void gather(const Layout& rows, int64_t ids) {
    ld_ = rows.ld;
    for (Buffer<T>* sums : {&mean_, &rest_}) {
      sums->allocate(ids * ld_);
      for (int64_t c = 0; c < ids * ld_; ++c) sums->data()[c] = 0;
    }
    count_.allocate(ids), spread_.allocate(ids);
    for (int64_t id = 0; id < ids; ++id) count_.data()[id] = spread_.data()[id] = 0;
    for (int64_t j = 0; j < rows.n; ++j) {
      T* mean = mean_.data() + rows.ids.data()[j] * ld_;
      for (int64_t c = 0; c < rows.d; c += kWidth<T>) store(mean + c, load(mean + c) + rows.row_vector(j, c));
      count_.data()[rows.ids.data()[j]] += 1;
    }
    for (int64_t id = 0; id < ids; ++id)
      for (int64_t c = 0; c < rows.d && count_.data()[id] > 0; ++c) mean_.data()[id * ld_ + c] /= T(count_.data()[id]);
    for (int64_t j = 0; j < rows.n; ++j) {
      const int64_t id = rows.ids.data()[j];
      const T* mean = mean_.data() + id * ld_;
      T* rest = rest_.data() + id * ld_;
      auto from_mean = [&](int64_t c) { return rows.row_vector(j, c) - load(mean + c); };
      for (int64_t c = 0; c < rows.d; c += kWidth<T>) store(rest + c, load(rest + c) + from_mean(c));
      spread_.data()[id] += dot<T>(rows.d, from_mean, from_mean) / 2;
    }
  }

  Class operator[](int64_t id) const {
    return {T(count_.data()[id]), mean_.data() + id * ld_, rest_.data() + id * ld_, spread_.data()[id]};
  }

 private:
  int64_t ld_ = 0;
  Buffer<T> mean_, rest_;
  Buffer<double> count_, spread_;
};

}  // namespace MIO_ISA
}  // namespace mio_ext
