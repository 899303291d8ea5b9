// The opt-in check of what a GPU call cannot see from the host.
#pragma once

#include "problem.hpp"

namespace flashspark::cuda {

// Where `check_device` or FLASHSPARK_CHECK=1 asks for it: waits for the stream, copies lengths, offsets, page tables,
// slots and factors to the host and holds them against the rules of the CPU, with its errors. One set of rules, at the
// price of the copies and the wait; a kernel of its own would need the same wait to return an error.
void check_if_asked(const Params &p);
void check_if_asked(const AppendParams &p);

}  // namespace flashspark::cuda
