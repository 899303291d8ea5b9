// One kernel for every type: what it does beside moving bytes is little.
#include "append/append.cuh"
#include "kernels.hpp"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::append_kv);
static_assert(kOperation.threads == flashspark::kAppendWarps * 32);

FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::AppendArguments arguments) {
  flashspark::append(arguments);
}
