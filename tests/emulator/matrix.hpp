// The arithmetic of ldmatrix and mma on a warp's registers, lane by lane, with the fragment layouts of the PTX manual.
#pragma once

#include <array>
#include <cstdint>

#include "random.hpp"

namespace flashspark::emulator {

// One lane's operands and results. The scheduler copies them, so no fiber reads another's stack.
struct Registers {
  uint32_t in[10];
  uint32_t out[4];
};

// The order in which a tensor core adds the 16 products of an element to its accumulator, which PTX leaves unspecified.
struct SumOrder {
  std::array<uint32_t, 16> column;
  uint32_t chunk;  // number of products summed before the sum is added to the accumulator

  explicit SumOrder(Random &random);
};

// mma.m16n8k16 for a warp. in: a[0..3], b0, b1, d[0..3] (bits); out: d.
void multiply_fragments(Registers *const (&lane)[32], bool bfloat16, const SumOrder &order);

// ldmatrix.x4: row[l] is what lane l's address points to.
void load_fragments(Registers *const (&lane)[32], const uint16_t *const (&row)[32], bool transposed);

}  // namespace flashspark::emulator
