// Kernels onto a stream.
#pragma once

#include "cuda/driver.hpp"
#include "cuda/plan.hpp"

namespace flashspark::cuda {

// `arguments`: the kernel's one parameter, copied by the driver. The context of the stream's device is current.
void launch(Kernel kernel, const Launch &shape, const void *arguments, Stream stream, Architecture arch);

}  // namespace flashspark::cuda
