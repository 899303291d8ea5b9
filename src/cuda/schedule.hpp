// attention_schedule on a GPU: the scheduler metadata of Stream-K, found once for many calls.
#pragma once

#include <cstdint>

#include "problem.hpp"

namespace flashspark::cuda {

// Puts on the stream what writes p.scheduler_metadata; nothing where schedule_size() is 0. p has passed
// validate_schedule().
void schedule(const Params &p);

// Elements that it writes.
int64_t schedule_size(const Params &p);

}  // namespace flashspark::cuda
