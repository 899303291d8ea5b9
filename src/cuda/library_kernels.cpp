#include "cuda/library_kernels.hpp"

#include "cuda/kernel_sources.hpp"
#include "flashspark/flashspark.h"

extern "C" FLASHSPARK_API const flashspark::cuda::LibraryKernels *flashspark_internal_kernels() {
  using namespace flashspark::cuda;
  static const LibraryKernels kernels{flashspark_version(), kernel_sources_hash(), fatbin_architectures(),
                                      fatbins().data(), fatbins().size()};
  return &kernels;
}
