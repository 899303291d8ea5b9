// What libflashspark.so offers to the flashspark command, which is installed beside it: its fatbins. The command has
// everything else of the library inside, and with them would be the larger half of a wheel. No part of the C interface.
#pragma once

#include <cstddef>
#include <string_view>

#include "cuda/fatbins.hpp"

namespace flashspark::cuda {

struct LibraryKernels {
  const char *version;            // of the library; only a program of the same version may read what follows
  std::string_view sources_hash;  // kernel_sources_hash(): a program of other sources gives kernels other arguments
  const char *architectures;
  const Fatbin *fatbins;
  size_t count;
};

constexpr char kLibraryKernelsSymbol[] = "flashspark_internal_kernels";
using GetLibraryKernels = const LibraryKernels *();

}  // namespace flashspark::cuda
