#include "forward/scheduler_metadata.cuh"

FLASHSPARK_KERNEL(32, 1)
flashspark_attention_schedule(FLASHSPARK_PARAMETER flashspark::ForwardArguments arguments) {
  flashspark::write_scheduler_metadata(arguments);
}
