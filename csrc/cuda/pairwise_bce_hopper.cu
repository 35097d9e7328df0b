// SPDX-License-Identifier: Apache-2.0
#include "pairwise_bce_hopper.cuh"

#include "pairwise_bce_launch.cuh"

namespace mio_ext {

namespace {

template <class A, int kWidth, bool kIds>
void launch_sweep_hopper(Sweep in, int multiprocessors, float* scratch, Stream stream) {
  using T = HopperTile<A, kWidth>;
  const Plan plan =
      plan_sweep(in.rows.n, in.cols.n, in.d, T::kBlockM, T::kBlockN, multiprocessors, 2 * multiprocessors);
  in.splits = plan.splits;
  in.tiles_per_split = plan.tiles_per_split;
  in.partial = plan.splits > 1 ? scratch : in.grad;
  launch(sweep_hopper_kernel<A, kWidth, kIds>, dim3(plan.row_blocks, plan.splits), T::kThreads + T::kFetchers,
         T::kSharedBytes, stream, in);
}

template <class A, int kWidth>
void launch_width_hopper(const Sweep& in, int multiprocessors, float* scratch, Stream stream) {
  in.rows.ids ? launch_sweep_hopper<A, kWidth, true>(in, multiprocessors, scratch, stream)
              : launch_sweep_hopper<A, kWidth, false>(in, multiprocessors, scratch, stream);
}

}  // namespace

template <class A>
void LaunchHopper<A>::sweep(Sweep in, int width, int multiprocessors, float* scratch, Stream stream) {
  if (in.prepares) Launch<A>::prepare(in.prepare, stream);
  if (width == 64) launch_width_hopper<A, 64>(in, multiprocessors, scratch, stream);
  if (width == 128) launch_width_hopper<A, 128>(in, multiprocessors, scratch, stream);
  if (width == 256) launch_width_hopper<A, 256>(in, multiprocessors, scratch, stream);
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
