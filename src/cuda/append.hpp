// append_kv on a GPU.
#pragma once

#include "append/arguments.hpp"
#include "cuda/plan.hpp"

namespace flashspark::cuda {

// What the kernel gets, and how many CTAs. p has passed validate(). Pure arithmetic.
struct AppendPlan {
  Launch launch;  // of Operation::append_kv
  AppendArguments arguments{};
};
AppendPlan make_append_plan(const AppendParams &p);

// Puts it on the stream and returns; no device memory is read by the host.
void append_kv(const AppendParams &p);

}  // namespace flashspark::cuda
