#pragma once
#include "problem.hpp"

namespace flashspark::cpu {

// The oracle: the definition in flashspark.h in double precision, one score at a time. O(Tk) memory a thread.
void reference_forward(const Params &p);

}  // namespace flashspark::cpu
