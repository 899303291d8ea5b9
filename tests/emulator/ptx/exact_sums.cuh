// The host counterpart of kernels/ptx/exact_sums.cuh.
#pragma once

#include "ptx/backward.cuh"

namespace flashspark::ptx {

inline void add_to_memory(uint64_t *to, uint64_t x) {
  *to += x;
}

}  // namespace flashspark::ptx
