#include "backward/clear.cuh"
#include "kernels.hpp"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::attention_backward_clear);
static_assert(kOperation.threads == flashspark::kClearThreads);

FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::ClearArguments arguments) {
  flashspark::clear_gradients(arguments);
}
