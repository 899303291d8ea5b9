#include "cuda/block_tiles.hpp"

#include <algorithm>
#include <numeric>
#include <string>

#include "cuda/arguments.hpp"
#include "cuda/heuristics.hpp"
#include "error.hpp"
#include "mod.hpp"

namespace flashspark::cuda {
namespace {

constexpr int64_t kVector = 16;  // bytes that the kernel clears at once

// A block that is larger holds all tokens, or keys.
Divisor block_divisor(int64_t size) {
  return make_divisor(static_cast<uint32_t>(std::min(size, kMaxTokens)));
}

// Query blocks that a row tile touches, at most. Row tiles begin at multiples of their tokens.
int64_t blocks_of_tile(int64_t tile_tokens, int64_t block_tokens) {
  return ceil_div(tile_tokens - std::gcd(tile_tokens, block_tokens), block_tokens) + 1;
}

// Bytes of each row tile's part: statuses, two counts and two lists.
int64_t bytes_of_row_tile(const BlockTileArguments &a) {
  return a.row_tile_stride + 2 * static_cast<int64_t>(sizeof(int32_t)) * (1 + int64_t{a.key_tiles});
}

void check_size(const Params &p, const BlockTilePlan &plan) {
  const int64_t bytes = bytes_of_row_tile(plan.arguments);
  if (plan.row_tiles <= kMaxScratchBytes / bytes) return;
  throw Error(FLASHSPARK_UNSUPPORTED, "cuda: blocks of block_size_q = " + std::to_string(p.block_size_q) +
                                          " tokens and block_size_k = " + std::to_string(p.block_size_k) +
                                          " keys do not fit the kernel's tile, and lists of " +
                                          std::to_string(plan.row_tiles) + " row tiles with " + std::to_string(bytes) +
                                          " bytes each would take more than 1 GiB; block sizes of 128 fit" +
                                          (p.leftpad_k != nullptr ? " without leftpad_k" : ""));
}

// Of row tiles in the order of BlockTileArguments, once bound.
BlockList derived_list(const BlockTileArguments &a, bool has_batch, bool has_heads) {
  const int64_t row_tiles = a.row_tiles.value, heads = a.heads.value;
  BlockList list{};
  list.count_block_stride = 1;
  list.count_head_stride = has_heads ? row_tiles : 0;
  list.count_batch_stride = has_batch ? heads * row_tiles : 0;
  list.index_block_stride = a.key_tiles;
  list.index_head_stride = list.count_head_stride * a.key_tiles;
  list.index_batch_stride = list.count_batch_stride * a.key_tiles;
  list.width = a.key_tiles;
  return list;
}

BlockSparseArguments derived_lists(const BlockTileArguments &a, const Params &p, const Shape &shape) {
  BlockSparseArguments lists{};
  lists.masked = lists.full = derived_list(a, a.by_sequence != 0, p.block_heads > 1);
  lists.block_tokens = make_divisor(static_cast<uint32_t>(a.tile_tokens));
  lists.tiles_per_block = make_divisor(1);
  lists.last_query_block = static_cast<int32_t>(a.row_tiles.value) - 1;
  lists.last_key_block = a.key_tiles - 1;
  lists.kv_group = make_divisor(static_cast<uint32_t>(shape.num_heads_kv / p.num_heads_kv));
  lists.statuses = {nullptr, a.row_tile_stride, a.tile_blocks, a.block_tokens, a.block_keys, a.last_key_block};
  return lists;
}

}  // namespace

BlockList block_list_of(const Params &p, const flashspark_block_list &list) {
  BlockList to{};
  to.counts = list.counts;
  to.indices = list.indices;
  to.count_batch_stride = p.block_batch > 1 ? list.count_batch_stride : 0;
  to.count_head_stride = p.block_heads > 1 ? list.count_head_stride : 0;
  to.count_block_stride = list.count_block_stride;
  to.index_batch_stride = p.block_batch > 1 ? list.index_batch_stride : 0;
  to.index_head_stride = p.block_heads > 1 ? list.index_head_stride : 0;
  to.index_block_stride = list.index_block_stride;
  to.width = static_cast<int32_t>(list.width);
  return to;
}

BlockTilePlan plan_block_tiles(const Params &p, const Shape &shape, const Tile &tile) {
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  const auto divisor = [](int64_t x) { return make_divisor(static_cast<uint32_t>(x)); };
  BlockTilePlan plan;
  BlockTileArguments &a = plan.arguments;
  static_cast<SequenceArguments &>(a) = arguments_of(p, shape, ScoreMod::none);
  a.lists[0] = block_list_of(p, p.masked_blocks);
  a.lists[1] = block_list_of(p, p.full_blocks);
  a.block_tokens = block_divisor(p.block_size_q);
  a.block_keys = block_divisor(p.block_size_k);
  a.last_query_block = narrow(p.num_blocks_q - 1);
  a.last_key_block = narrow(key_blocks(p) - 1);
  a.tile_tokens = narrow(tile.rows() / shape.group);
  a.tile_keys = tile.keys;
  a.key_tiles = narrow(std::max<int64_t>(ceil_div(p.max_seqlen_k, tile.keys), 1));
  a.tile_blocks = narrow(blocks_of_tile(a.tile_tokens, a.block_tokens.value));
  a.row_tile_stride = ceil_div(key_blocks(p) * a.tile_blocks, kVector) * kVector;
  a.by_sequence = p.block_batch > 1 || p.leftpad_k != nullptr;
  const int64_t heads = p.block_heads > 1 ? p.num_heads_q : 1, of_sequence = ceil_div(p.max_seqlen_q, a.tile_tokens);
  a.heads = divisor(heads);
  a.row_tiles = divisor(of_sequence);
  plan.row_tiles = (a.by_sequence != 0 ? p.num_seqs : 1) * heads * of_sequence;
  check_size(p, plan);
  plan.bytes = static_cast<size_t>(plan.row_tiles * bytes_of_row_tile(a));
  plan.lists = derived_lists(a, p, shape);
  return plan;
}

void BlockTilePlan::bind(void *memory) {
  BlockTileArguments &a = arguments;
  a.statuses = static_cast<uint8_t *>(memory);
  auto *words = reinterpret_cast<int32_t *>(a.statuses + row_tiles * a.row_tile_stride);
  for (int n = 0; n < 2; ++n) {
    a.counts[n] = words + n * row_tiles;
    a.indices[n] = words + 2 * row_tiles + n * row_tiles * a.key_tiles;
  }
  lists.masked.counts = a.counts[0], lists.masked.indices = a.indices[0];
  lists.full.counts = a.counts[1], lists.full.indices = a.indices[1];
  lists.statuses.data = a.statuses;
}

}  // namespace flashspark::cuda
