// -DFLASHSPARK_ELEMENT=Bfloat16 or Float16.
#include "forward/combine.cuh"

FLASHSPARK_KERNEL(flashspark::kCombineWarps * 32, 3)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::ForwardArguments arguments) {
  flashspark::combine<flashspark::ptx::FLASHSPARK_ELEMENT>(arguments);
}
