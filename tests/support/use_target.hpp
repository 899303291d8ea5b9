// Sets the CPU engine's SIMD target for a scope.
#pragma once

#include "cpu/tile.hpp"

namespace flashspark::test {

class UseTarget {
 public:
  explicit UseTarget(const cpu::Kernels *kernels) { cpu::use_kernels(kernels); }
  UseTarget(const UseTarget &) = delete;
  UseTarget &operator=(const UseTarget &) = delete;
  ~UseTarget() { cpu::use_kernels(nullptr); }
};

}  // namespace flashspark::test
