// What only exact sums issue. tests/emulator/ptx/exact_sums.cuh declares the same for the host.
#pragma once

#include "ptx/backward.cuh"

namespace flashspark::ptx {

// red.global.add.u64.
FLASHSPARK_DEVICE void add_to_memory(uint64_t *to, uint64_t x) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(x) : "memory");
}

}  // namespace flashspark::ptx
