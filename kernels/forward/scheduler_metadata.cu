#include "forward/scheduler_metadata.cuh"
#include "kernels.hpp"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::attention_schedule);
static_assert(kOperation.threads == 32, "one warp writes a record");

FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::ForwardArguments arguments) {
  flashspark::write_scheduler_metadata(arguments);
}
