#pragma once
#include "problem.hpp"

namespace flashspark::cpu {

// The oracle: the definition in flashspark.h in double precision, one score at a time. O(Tk) memory a thread.
void reference_forward(const Params &p);
// Its gradients, by the formula there. Accumulates those of a KV head and of captured tensors in double precision.
void reference_backward(const BackwardParams &p);

}  // namespace flashspark::cpu
