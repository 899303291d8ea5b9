// A backward kernel with the user's functions. The build does not compile it: the library does, at run time, behind the
// text of UserFunctions (src/graph/cuda_source.hpp), with the macros of backward.cu and
//
//   FLASHSPARK_BLOCK_SPARSE  1: lists say which blocks of rows and keys are computed
//   FLASHSPARK_IN_TURNS      1: CTAs add to dq in turns
//   FLASHSPARK_NATIVE        1: biases and masks of NativeScoreMod stand beside the functions
//   FLASHSPARK_EXACT_SUMS    1: gradients of captured tensors are summed exactly
#include "backward/function_loop.cuh"
#include "forward/tiles.cuh"

#include FLASHSPARK_USER_FUNCTIONS

namespace flashspark {

using Kernel = FunctionBackwardTraits<BackwardIndex::FLASHSPARK_NAME, kArchitecture, ptx::FLASHSPARK_ELEMENT,
                                      UserFunctions, FLASHSPARK_BLOCK_SPARSE != 0, FLASHSPARK_IN_TURNS != 0,
                                      FLASHSPARK_NATIVE != 0, FLASHSPARK_EXACT_SUMS != 0>;

}  // namespace flashspark

FLASHSPARK_KERNEL(flashspark::Kernel::kThreads, flashspark::Kernel::kTile.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::FunctionBackwardArguments arguments) {
  flashspark::function_backward<flashspark::Kernel>(arguments);
}
