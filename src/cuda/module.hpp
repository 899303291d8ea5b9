// Kernels out of the embedded fatbins, loaded when they are first needed.
#pragma once

#include "cuda/driver.hpp"
#include "cuda/plan.hpp"

namespace flashspark::cuda {

// The kernel of a fatbin, ready for the current context's device `index`. Costs two loads from memory but for the first
// call, which loads the fatbin; legal while a stream is captured. `shared_bytes`: the most that it is launched with.
Kernel forward_kernel(const Instance &instance, KernelDType dtype, int index, uint32_t shared_bytes);
Kernel combine_kernel(KernelDType dtype, int index);
Kernel schedule_kernel(int index);
Kernel quantize_kernel(int index);
Kernel append_kernel(int index);
Kernel named_kernel(const char *name);  // uncached, for tools

}  // namespace flashspark::cuda
