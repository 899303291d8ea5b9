// One type of out a translation unit: -DFLASHSPARK_ELEMENT=Bfloat16 or Float16. The build passes the entry point's name
// as FLASHSPARK_ENTRY.
#include "forward/combine.cuh"

FLASHSPARK_KERNEL(flashspark::kCombineWarps * 32, 3)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::CombineArguments arguments) {
  flashspark::combine<flashspark::ptx::FLASHSPARK_ELEMENT>(arguments);
}
