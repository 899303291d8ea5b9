// The CUDA implementation of attention, as the table of implementations sees it.
#pragma once

#include <cstddef>
#include <string>

#include "problem.hpp"

namespace flashspark::cuda {

// Puts the problem on its stream and returns: no synchronisation, and no byte of device memory is read, so a call may
// be captured into a graph. params have passed validate() and unavailable().
void forward(const Params &p);

// Bytes that forward() takes on the stream when the caller gives none.
size_t workspace(const Params &p);

// Finds once what the blocks of forward() would find of the lengths each time, and puts it into p.scheduler_metadata;
// nothing where schedule_size() is 0. p has passed validate_schedule().
void schedule(const Params &p);
int64_t schedule_size(const Params &p);

// What runs it. Does not load the driver for a problem of the CPU.
std::string detail(const Params &p);

// Why this problem cannot run, in words; empty if it can.
std::string unavailable(const Params &p);

}  // namespace flashspark::cuda
