// A forward kernel with the user's functions. The build does not compile it: the library does, at run time, behind the
// text of UserFunctions (src/graph/cuda_source.hpp), with the macros of forward.cu and
//
//   FLASHSPARK_NATIVE        1: softcap, biases and the other masks of NativeScoreMod beside the functions
//   FLASHSPARK_BLOCK_SPARSE  1: key tiles come from lists; 2: which are derived, as the user's blocks do not fit them
//   FLASHSPARK_DROPOUT       1: probabilities are dropped
//   FLASHSPARK_CONTIGUOUS    1: there is no page table
#include "forward/entry.cuh"

#include FLASHSPARK_USER_FUNCTIONS

namespace flashspark {

using Kernel =
    Traits<InstanceIndex::FLASHSPARK_NAME, kArchitecture, Mma,
           FunctionScoreMod<UserFunctions, FLASHSPARK_NATIVE != 0, FLASHSPARK_BLOCK_SPARSE != 0,
                            FLASHSPARK_BLOCK_SPARSE == 2, FLASHSPARK_DROPOUT != 0, FLASHSPARK_CONTIGUOUS != 0>>;

}  // namespace flashspark

FLASHSPARK_KERNEL(flashspark::Kernel::kThreads, flashspark::Kernel::kTile.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::FunctionForwardArguments arguments) {
  flashspark::forward<flashspark::Kernel>(arguments);
}
