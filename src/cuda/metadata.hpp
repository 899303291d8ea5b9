// The opt-in check of the numbers in device memory that the host does not see.
#pragma once

#include "problem.hpp"

namespace flashspark::cuda {

// If `check_device` or FLASHSPARK_CHECK=1 asks for it: waits for the stream, copies lengths, offsets, page tables,
// slots and factors to the host and checks them as for the CPU, with the same errors. That costs the copies and the
// wait, but a checking kernel would need the wait too, and rules of its own.
void check_if_asked(const Params &p);
void check_if_asked(const AppendParams &p);

}  // namespace flashspark::cuda
