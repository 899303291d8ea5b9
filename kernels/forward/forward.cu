// One instance a translation unit: -DFLASHSPARK_NAME=d128 -DFLASHSPARK_NUMBER=Bfloat16, or for keys and values in e4m3
// -DFLASHSPARK_NUMBER=Float16 -DFLASHSPARK_STORED=E4m3.
// -DFLASHSPARK_TILES_SM120F gives every architecture the tiles of sm_120f, to time them on a stand-in.
#include "forward/forward.cuh"

namespace flashspark {

#if defined(FLASHSPARK_TILES_SM120F) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200)
constexpr Architecture kArchitecture = Architecture::sm_120f;
#else
constexpr Architecture kArchitecture = Architecture::sm_90;
#endif
#if defined(FLASHSPARK_STORED)
using Kernel = Traits<InstanceIndex::FLASHSPARK_NAME, kArchitecture, ptx::FLASHSPARK_NUMBER, ptx::FLASHSPARK_STORED>;
#else
using Kernel = Traits<InstanceIndex::FLASHSPARK_NAME, kArchitecture, ptx::FLASHSPARK_NUMBER>;
#endif

}  // namespace flashspark

FLASHSPARK_KERNEL(flashspark::Kernel::kThreads, flashspark::Kernel::kTile.blocks)
flashspark_forward(FLASHSPARK_PARAMETER flashspark::ForwardArguments arguments) {
  flashspark::forward<flashspark::Kernel>(arguments);
}
