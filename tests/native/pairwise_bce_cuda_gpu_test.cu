// SPDX-License-Identifier: Apache-2.0
// The same test, compiled for a GPU.
#include "pairwise_bce_cuda_test.cpp"
