#include "cuda/launch.hpp"

namespace flashspark::cuda {

// Programmatic dependent launch: kernels wait for the previous one by themselves (griddepcontrol.wait), so that the
// driver may start them while that one drains. It does so from compute capability 9.0 on.
void launch(Kernel kernel, const Launch &shape, const void *arguments, Stream stream, Architecture arch) {
  void *parameters[] = {const_cast<void *>(arguments)};
  LaunchAttribute early{kProgrammaticStreamSerialization, 0, {1}};
  const LaunchConfig config{
      {shape.grid[0], shape.grid[1], shape.grid[2]}, {shape.threads, 1, 1}, shape.shared_bytes, stream, &early,
      arch == Architecture::sm_80 ? 0u : 1u};
  // The driver accepts a kernel as a function, and runs it in the stream's context.
  FLASHSPARK_CUDA_CALL(driver(), cuLaunchKernelEx, &config, reinterpret_cast<Function>(kernel), parameters, nullptr);
}

}  // namespace flashspark::cuda
