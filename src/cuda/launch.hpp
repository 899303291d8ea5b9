// Puts a kernel on a stream.
#pragma once

#include "cuda/driver.hpp"
#include "cuda/plan.hpp"

namespace flashspark::cuda {

// `arguments`: the kernel's only parameter, which the driver copies. A context of the stream's device must be current.
void launch(Kernel kernel, const Launch &shape, const void *arguments, Stream stream, Architecture arch);

}  // namespace flashspark::cuda
