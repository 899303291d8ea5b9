#include "attention/block_tiles.cuh"
#include "kernels.hpp"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::attention_block_tiles);
static_assert(kOperation.threads == flashspark::kBlockTileThreads);

FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::BlockTileArguments arguments) {
  flashspark::derive_block_tiles(arguments);
}
