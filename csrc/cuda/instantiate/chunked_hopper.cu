// SPDX-License-Identifier: Apache-2.0
#include "../chunked_hopper.cuh"

#include "../launch.cuh"

namespace mio_ext {

template <class A>
void LaunchChunkedHopper<A>::logits(const ChunkLogits& in, int blocks, Stream stream) {
  launch(in.rows.ids ? chunk_hopper_kernel<A, true> : chunk_hopper_kernel<A, false>, dim3(blocks),
         WideTile::kThreads + WideTile::kProducerThreads, WideTile::kSharedBytes, stream, in, false,
         WideTile::kCluster);
}

template struct LaunchChunkedHopper<Bf16>;
template struct LaunchChunkedHopper<Fp16>;

}  // namespace mio_ext
