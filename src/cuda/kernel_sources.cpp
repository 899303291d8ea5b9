#include "cuda/kernel_sources.hpp"

#include "cuda/sha256.hpp"

namespace flashspark::cuda {

std::string_view kernel_sources_hash() {
  static const std::string hash = [] {
    Sha256 sum;
    for (const SourceFile &file : kernel_sources()) {
      sum.add_field(file.name);
      sum.add_field(file.text);
    }
    return sum.finish_hex();
  }();
  return hash;
}

}  // namespace flashspark::cuda
