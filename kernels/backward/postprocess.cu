// One kernel a type: -DFLASHSPARK_ELEMENT=Bfloat16 or Float16.
#include "backward/postprocess.cuh"
#include "kernels.hpp"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::attention_backward_postprocess);
static_assert(kOperation.threads == flashspark::kPostprocessThreads);

FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::BackwardArguments arguments) {
  flashspark::postprocess<flashspark::ptx::FLASHSPARK_ELEMENT>(arguments);
}
