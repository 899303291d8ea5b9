// -DFLASHSPARK_ELEMENT=Bfloat16 or Float16.
#include "forward/combine.cuh"
#include "kernels.hpp"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::attention_forward_combine);
static_assert(kOperation.threads == flashspark::kCombineWarps * 32);
static_assert(kOperation.shared_bytes == flashspark::kCombineWarps * flashspark::kCombineWarpBytes);

FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::ForwardArguments arguments) {
  flashspark::combine<flashspark::ptx::FLASHSPARK_ELEMENT>(arguments);
}
