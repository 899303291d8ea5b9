// One kernel a translation unit; kernels.json has the macros of each: -DFLASHSPARK_NAME=d128_prefill
// -DFLASHSPARK_ELEMENT=Bfloat16, or for keys and values in e4m3 -DFLASHSPARK_ELEMENT=Float16
// -DFLASHSPARK_ELEMENT_KV=E4m3, and the entry point's name as FLASHSPARK_ENTRY. -DFLASHSPARK_TILES_SM120F gives every
// architecture the tiles of sm_120f, to time them on a stand-in.
#include "forward/entry.cuh"

namespace flashspark {

using Kernel = Traits<InstanceIndex::FLASHSPARK_NAME, kArchitecture, Mma>;

}  // namespace flashspark

FLASHSPARK_KERNEL(flashspark::Kernel::kThreads, flashspark::Kernel::kTile.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::ForwardArguments arguments) {
  flashspark::forward<flashspark::Kernel>(arguments);
}
