// What the host hands to the block mask kernel, and how much shared memory it takes.
#pragma once

#include "attention/function_arguments.hpp"

namespace flashspark {

struct BlockMaskArguments {
  FunctionArguments functions;  // the mask function's captures alone
  // The lists (flashspark_block_mask_params): of blocks that are seen in part, and wholly. counts[1] == NULL: of blocks
  // that are seen, alone.
  int32_t *counts[2], *indices[2];
  int32_t num_seqs, num_heads;
  int32_t asked_seqs, asked_heads;  // 1 where the function is the same for all of them, which then get copies
  int32_t seqlen_q, seqlen_k;
  int32_t block_size_q, block_size_k;  // at most the lengths
  int32_t num_blocks_q, num_blocks_k;
  bool ragged_q, ragged_k;  // the last block sticks out of the sequence
};

constexpr int32_t kBlockMaskThreads = 256, kBlockMaskMinCtas = 2;
// Key blocks between two barriers: one for each thread when they are put into the lists.
constexpr int32_t kBlockMaskRound = kBlockMaskThreads;

// Query rows whose words (attention/function_mod.cuh) are in shared memory at a time: at most 32 KB for the most words
// that a graph can have, 8192.
constexpr int32_t block_mask_rows(int32_t words) {
  return words <= 64 ? 128 : (words <= 1024 ? 8 : 1);
}
constexpr uint32_t block_mask_shared_bytes(int32_t words) {
  const int32_t all = block_mask_rows(words) * words + kBlockMaskRound + kBlockMaskThreads / 32;
  return static_cast<uint32_t>(all) * 4;
}

}  // namespace flashspark
