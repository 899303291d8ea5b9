// The block mask kernel of a mask function, compiled at run time as forward/function.cu is, with the macros
//
//   FLASHSPARK_USER_FUNCTIONS  the file with the type UserFunctions
//   FLASHSPARK_LANE_KEYS       keys that a lane holds at a time: 1, 2 or 4
#include "mask/block_mask.cuh"

#include FLASHSPARK_USER_FUNCTIONS

FLASHSPARK_KERNEL(flashspark::kBlockMaskThreads, flashspark::kBlockMaskMinCtas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::BlockMaskArguments arguments) {
  flashspark::make_block_lists<flashspark::UserFunctions::Mask, FLASHSPARK_LANE_KEYS>(arguments);
}
