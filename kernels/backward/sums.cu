// One kernel for all types: it adds float32.
#include "backward/sums.cuh"
#include "kernels.hpp"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::attention_backward_sums);
static_assert(kOperation.threads == flashspark::kSumsThreads);

FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::BackwardArguments arguments) {
  flashspark::sums(arguments);
}
