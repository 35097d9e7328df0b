// SPDX-License-Identifier: Apache-2.0
#include "../sweep_hopper.cuh"

#include "../launch.cuh"

namespace mio_ext {

template <class A>
void LaunchHopper<A>::sweep(Sweep in, int width, int multiprocessors, float* scratch, Stream stream) {
  if (in.prepares) Launch<A>::prepare(in.prepare, stream);
  in.prepares = false;
  with_width(width, in.rows.ids, [&](auto w, auto ids) {
    using T = HopperTile<A, w()>;
    launch_planned<T>(sweep_hopper_kernel<A, w(), ids()>, T::kThreads + T::kProducerThreads, 1,
                      plan_hopper<T>(in.rows.n, in.cols.n, in.d, multiprocessors), false, in, scratch, stream);
  });
}

extern template struct Launch<Bf16>;
extern template struct Launch<Fp16>;
template struct LaunchHopper<Bf16>;
template struct LaunchHopper<Fp16>;

// MIO_HOPPER: the build is for 9.0a.
bool hopper_is_built() {
#if defined(MIO_HOPPER) || !defined(__CUDACC__)
  return true;
#else
  return false;
#endif
}

}  // namespace mio_ext
