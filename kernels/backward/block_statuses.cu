#include "backward/block_statuses.cuh"
#include "kernels.hpp"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::attention_backward_blocks);
static_assert(kOperation.threads == flashspark::kBlockStatusThreads);

FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::BlockStatusArguments arguments) {
  flashspark::find_block_statuses(arguments);
}
