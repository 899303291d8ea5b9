#pragma once
#include "problem.hpp"

namespace flashspark::cpu {

// Writes the new rows, and turns q in place. p has passed validate(), and its memory is the host's.
void append_kv(const AppendParams &p);

}  // namespace flashspark::cpu
