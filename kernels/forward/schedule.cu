#include "forward/schedule.cuh"

FLASHSPARK_KERNEL(32, 1)
flashspark_schedule(FLASHSPARK_PARAMETER flashspark::ForwardArguments arguments) {
  flashspark::schedule(arguments);
}
