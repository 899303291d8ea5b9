// The compiled kernels, embedded in the library by cmake/Fatbin.cmake. The flashspark command takes them from the
// library: tools/cli/kernels.cpp.
#pragma once

#include <iterator>
#include <span>

namespace flashspark::cuda {

struct Fatbin {
  const char *name;  // "attention_forward_d128_short_q_bf16", "append_kv"; its entry point is "flashspark_" + name
  const unsigned char *begin, *end;
};

// Empty in a build without nvcc.
std::span<const Fatbin> fatbins();

// What they were compiled for: "sm_80, sm_90, sm_120f"; "" when there are none.
const char *fatbin_architectures();

// Why there are none, in words; "" when there are.
const char *why_no_fatbins();

}  // namespace flashspark::cuda
