// Kernels out of the embedded fatbins, loaded when they are first needed.
#pragma once

#include "cuda/driver.hpp"
#include "cuda/kernel_key.hpp"

namespace flashspark::cuda {

// The kernel of a fatbin, ready for the current context's device `index`. Costs two loads from memory but for the first
// call, which loads the fatbin; legal while a stream is captured. `shared_bytes`: the most that it is launched with.
Kernel get(const KernelKey &key, int index, uint32_t shared_bytes = 0);

// A kernel of a cubin, or a fatbin, in memory that stays as long as the process: ready to be launched on device
// `index`.
Kernel load_kernel(const void *image, const std::string &entry, int index, uint32_t shared_bytes);

}  // namespace flashspark::cuda
