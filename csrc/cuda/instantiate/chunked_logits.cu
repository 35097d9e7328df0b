// SPDX-License-Identifier: Apache-2.0
#include "../chunked_logits.cuh"

#include "../launch.cuh"

namespace mio_ext {

template <class A>
void LaunchChunkedLogits<A>::logits(const ChunkLogits& in, Stream stream) {
  using T = PortableWideTile;
  launch(in.rows.ids ? chunk_logits_kernel<A, true> : chunk_logits_kernel<A, false>,
         dim3(ceil_div(in.n, T::kBlockM) * (in.cols.n_pad / T::kBlockN)), T::kThreads, T::kSharedBytes, stream, in);
}

template struct LaunchChunkedLogits<Bf16>;
template struct LaunchChunkedLogits<Fp16>;

}  // namespace mio_ext
