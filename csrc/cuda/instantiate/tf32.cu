// SPDX-License-Identifier: Apache-2.0
#include "../launch.cuh"

namespace mio_ext {
template struct Launch<Tf32>;
}
