// create_block_mask on the CPU.
#pragma once

#include "problem.hpp"

namespace flashspark::cpu {

// p has passed validate().
void create_block_mask(const BlockMaskParams &p);

}  // namespace flashspark::cpu
