// -DFLASHSPARK_NUMBER=Bfloat16 or Float16.
#include "forward/merge.cuh"

FLASHSPARK_KERNEL(flashspark::kMergeWarps * 32, 3)
flashspark_merge(FLASHSPARK_PARAMETER flashspark::ForwardArguments arguments) {
  flashspark::merge<flashspark::ptx::FLASHSPARK_NUMBER>(arguments);
}
