// attention_forward on a GPU, as the table of implementations sees it.
#pragma once

#include <cstddef>
#include <string>

#include "problem.hpp"
#include "scratch.hpp"

namespace flashspark::cuda {

// Puts the problem on its stream and returns: no synchronisation, and no byte of device memory is read, so a call may
// be captured into a graph. p has passed validate() and unsupported().
void forward(const Params &p, const ScratchSource &scratch);

// Bytes of scratch memory that forward() takes.
size_t workspace(const Params &p);

// What runs it. Does not load the driver for a problem of the CPU.
std::string detail(const Params &p);

// The plan of the call, a line for each launch; empty where the device cannot be used or there is nothing to compute.
std::string plan_text(const Params &p);

}  // namespace flashspark::cuda
