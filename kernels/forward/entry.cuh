// What the macros of a translation unit choose (kernels.json): the tiles and the operand policy. The entry points are
// in forward.cu and function.cu.
#pragma once

#include "forward/kernel.cuh"
#include "forward/tiles.cuh"

namespace flashspark {

#if defined(FLASHSPARK_ELEMENT_KV)
using Mma = MmaE4m3Dequant;
static_assert(std::is_same_v<Mma::Element, ptx::FLASHSPARK_ELEMENT> &&
              std::is_same_v<Mma::ElementKV, ptx::FLASHSPARK_ELEMENT_KV>);
#else
using Mma = MmaF16<ptx::FLASHSPARK_ELEMENT>;
#endif

}  // namespace flashspark
