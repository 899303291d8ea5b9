#include "forward/scheduler/metadata.cuh"

FLASHSPARK_KERNEL(32, 1)
flashspark_attention_schedule(FLASHSPARK_PARAMETER flashspark::ScheduleArguments arguments) {
  flashspark::write_scheduler_metadata(arguments);
}
