// Forward kernels with the user's functions, block lists or dropout: compiled by NVRTC when they are first needed, then
// kept.
#pragma once

#include "cuda/driver.hpp"
#include "cuda/nvrtc.hpp"
#include "cuda/plan.hpp"

namespace flashspark::cuda {

// The kernel of a plan with `functions`, ready to be launched on device `index`. For any thread; threads that need one
// kernel at once compile it once.
Kernel get_function_kernel(const Params &p, const Plan &plan, const FunctionPlan &functions, int index);

// What it is compiled from.
CompileRequest function_request(const Params &p, const Plan &plan, const FunctionPlan &functions, Architecture arch);

}  // namespace flashspark::cuda
