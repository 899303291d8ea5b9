// One kernel a translation unit; kernels.json has the macros of each: -DFLASHSPARK_NAME=d64
// -DFLASHSPARK_ELEMENT=Bfloat16 and the entry point's name as FLASHSPARK_ENTRY.
#include "backward/kernel.cuh"
#include "forward/tiles.cuh"

namespace flashspark {

using Kernel = BackwardTraits<BackwardIndex::FLASHSPARK_NAME, kArchitecture, ptx::FLASHSPARK_ELEMENT>;

}  // namespace flashspark

FLASHSPARK_KERNEL(flashspark::Kernel::kThreads, flashspark::Kernel::kTile.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::BackwardArguments arguments) {
  flashspark::backward<flashspark::Kernel>(arguments);
}
