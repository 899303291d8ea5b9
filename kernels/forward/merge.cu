#include "forward/merge.cuh"

FLASHSPARK_KERNEL(flashspark::kMergeWarps * 32, 3)
flashspark_merge(FLASHSPARK_PARAMETER flashspark::ForwardArguments arguments) {
  flashspark::merge(arguments);
}
