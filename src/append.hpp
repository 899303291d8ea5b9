#pragma once
#include "problem.hpp"

namespace flashspark {

// Writes the new rows (validated params, CPU memory).
void append_kv(const AppendParams &p);

}  // namespace flashspark
