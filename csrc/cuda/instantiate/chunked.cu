// SPDX-License-Identifier: Apache-2.0
#include "../chunked.cuh"

#include "../launch.cuh"

namespace mio_ext {

template <class A>
void LaunchChunked<A>::prepare(const Prepare& in, Stream stream) {
  launch_prepare<A, kWideRowLanes>(in, stream);
}

void LaunchChunkedTerms::terms(const ChunkTerms& in, Stream stream) {
  launch(in.rows.ids ? terms_kernel<Fp32, true> : terms_kernel<Fp32, false>, dim3(ceil_div(in.n, kChunkWarps)),
         32 * kChunkWarps, kChunkShared, stream, in);
}

template <class A>
void LaunchChunked<A>::project(const ChunkProjection& in, Stream stream) {
  launch(in.rows.ids ? project_kernel<A, true> : project_kernel<A, false>, dim3(ceil_div(in.rows.n, kChunkWarps)),
         32 * kChunkWarps, kChunkShared, stream, in);
}

template struct LaunchChunked<Bf16>;
template struct LaunchChunked<Fp16>;
template struct LaunchChunked<Fp32>;

}  // namespace mio_ext
