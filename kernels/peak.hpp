// What the host has to know of peak.cu to count its products.
#pragma once

#include <cstdint>

namespace flashspark {

constexpr int32_t kPeakChains = 8;  // products in flight a warp; with 16 warps an SM more do not help

}  // namespace flashspark
