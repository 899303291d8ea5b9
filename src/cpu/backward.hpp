#pragma once
#include "problem.hpp"

namespace flashspark::cpu {

// Gradients in SIMD on all cores (docs/design/backward.md).
void engine_backward(const BackwardParams &p);

}  // namespace flashspark::cpu
