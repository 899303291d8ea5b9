// kernels.def as a table for host and device.
#pragma once

#include <cstdint>

namespace flashspark {

// What a kernel is compiled for: the type of q, k, v and out. e4m3: of k and v alone, and the kernel computes in fp16.
// none: the types are arguments.
enum class KernelDType : uint8_t { none, bf16, fp16, e4m3 };
constexpr int32_t kNumKernelDTypes = 4;

// The value is its place in operations::kTable.
enum class Operation : int32_t {
#define FLASHSPARK_OPERATION(operation, ...) operation,
#include "kernels.def"
#undef FLASHSPARK_OPERATION
};

// The table that has an operation's instances.
enum class InstanceTable : uint8_t { none, forward, backward };

struct OperationTraits {
  const char *name;
  const char *source;
  InstanceTable instances = InstanceTable::none;
  KernelDType dtypes[kNumKernelDTypes - 1] = {};  // ends with the first `none`
  uint32_t threads = 0, min_ctas = 0, shared_bytes = 0, rows = 0;
};

#define FLASHSPARK_OPERATION(operation, ...) {.name = #operation, __VA_ARGS__},
namespace operations {
using enum KernelDType;
inline constexpr OperationTraits kTable[] = {
#include "kernels.def"
};
}  // namespace operations
#undef FLASHSPARK_OPERATION

constexpr const OperationTraits &traits_of(Operation operation) {
  return operations::kTable[static_cast<int32_t>(operation)];
}

}  // namespace flashspark
