#include "backward/round.cuh"
#include "kernels.hpp"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::attention_backward_round);
static_assert(kOperation.threads == flashspark::kRoundThreads);

FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::RoundArguments arguments) {
  flashspark::round_gradients(arguments);
}
