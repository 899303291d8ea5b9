// The sources of the kernels as text, embedded by cmake/EmbedSources.cmake for NVRTC.
#pragma once

#include <span>
#include <string_view>

namespace flashspark::cuda {

struct SourceFile {
  const char *name;       // as others include it: "forward/kernel.cuh", "cstdint"
  std::string_view text;  // a NUL follows it
};

std::span<const SourceFile> kernel_sources();

// Of all names and texts, in hexadecimal.
std::string_view kernel_sources_hash();

}  // namespace flashspark::cuda
