// The kernel that derives lists of key tiles from lists of blocks, against the definition: every token with every key.
#include "attention/block_tiles.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "cuda/block_tiles.hpp"
#include "emulator.hpp"
#include "guarded.hpp"
#include "kernels.hpp"
#include "support/functions.hpp"

namespace flashspark::emulator {
namespace {

using Status = test::BlockLists::Status;

// A problem of random sizes, with the memory that it points to.
struct RandomLists {
  explicit RandomLists(uint64_t seed) : draw(seed, 't') {
    flashspark_attention_params_init(&p);
    for (flashspark_tensor *t : {&p.q, &p.k, &p.v, &p.out}) t->dtype = FLASHSPARK_BFLOAT16;
    p.device = FLASHSPARK_CUDA;
    p.head_dim = p.head_dim_v = 64;
    p.num_seqs = draw.from(1, 4), p.num_heads_kv = draw.from(1, 2), p.num_heads_q = p.num_heads_kv * draw.from(1, 4);
    p.max_seqlen_q = draw.from(1, 300), p.max_seqlen_k = draw.from(1, draw.one_in(3) ? 12000 : 300);
    padding.assign(static_cast<size_t>(p.num_seqs), 0);
    tokens.assign(static_cast<size_t>(p.num_seqs), static_cast<int32_t>(p.max_seqlen_q));
    if (draw.one_in(2)) {
      for (int32_t &pad : padding) pad = static_cast<int32_t>(draw.from(0, std::min<int64_t>(p.max_seqlen_k, 200)));
      p.leftpad_k = padding.data();
    }
    if (draw.one_in(2)) {
      for (int32_t &n : tokens) n = static_cast<int32_t>(draw.from(0, p.max_seqlen_q));
      p.seqused_q = tokens.data();
    }
    wish.size_q = 16 * draw.from(1, draw.one_in(2) ? 3 : 20), wish.size_k = 16 * draw.from(1, draw.one_in(2) ? 3 : 20);
    wish.per_batch = draw.one_in(2), wish.per_head = draw.one_in(2);
    wish.masked = !draw.one_in(4), wish.full = !wish.masked || !draw.one_in(4);
    if (draw.one_in(2)) (draw.one_in(2) ? wish.none : wish.all) = 40;
    tile = kInstances[draw.below(std::size(kInstances))].sm_120f;
  }

  cases::Random draw;
  Params p{};
  std::vector<int32_t> padding, tokens;
  test::BlockListWish wish;
  Tile tile{};
};

// What the definition says of a key tile: kUnlisted if the tile has no key.
BlockStatus expected(const RandomLists &x, const test::BlockLists &lists, int64_t b, int64_t h, int64_t first_token,
                     int64_t end_token, int64_t first_key, int64_t end_key) {
  bool any = false, all = true;
  const int64_t of_b = x.wish.per_batch ? b : 0;
  for (int64_t i = first_token; i < end_token; i += 16 - i % 16) {  // nothing changes between multiples of 16
    for (int64_t j = std::max<int64_t>(first_key, 0); j < end_key && j / x.wish.size_k < lists.blocks_k(); ++j) {
      const int64_t row = (of_b * lists.heads() + h) * lists.blocks_q() + i / x.wish.size_q;
      const Status status = lists.statuses()[static_cast<size_t>(row * lists.blocks_k() + j / x.wish.size_k)];
      any = any || status != Status::kNone;
      all = all && status == Status::kFull;
    }
  }
  return !any ? kUnlisted : all ? kWhole : kListed;
}

// Compares the two lists of one row tile.
void check_row_tile(const RandomLists &x, const test::BlockLists &lists, const BlockTileArguments &a, int64_t b,
                    int64_t h, int64_t row_tile) {
  const int64_t index = (b * a.heads.value + h) * a.row_tiles.value + row_tile, first = row_tile * a.tile_tokens;
  const int64_t tokens = a.by_sequence != 0 ? x.tokens[static_cast<size_t>(b)] : x.p.max_seqlen_q;
  if (first >= tokens) {
    EXPECT_EQ(a.counts[0][index], -1) << "no tokens, no result";
    return;
  }
  std::vector<int32_t> wanted[2];
  for (int32_t n = 0; n < a.key_tiles; ++n) {
    const int64_t key = int64_t{n} * a.tile_keys - (a.by_sequence != 0 ? x.padding[static_cast<size_t>(b)] : 0);
    const BlockStatus status =
        expected(x, lists, b, h, first, std::min(first + a.tile_tokens, tokens), key, key + a.tile_keys);
    if (status != kUnlisted) wanted[status == kWhole ? 1 : 0].push_back(n);
  }
  for (int list = 0; list < 2; ++list) {
    const int32_t *begin = a.indices[list] + index * a.key_tiles;
    ASSERT_GE(a.counts[list][index], 0);
    EXPECT_EQ(std::vector<int32_t>(begin, begin + a.counts[list][index]), wanted[list]) << list;
  }
}

TEST(BlockTiles, AreWhatTheBlocksSay) {
  for (uint64_t seed = 1; seed <= 250; ++seed) {
    SCOPED_TRACE(seed);
    RandomLists x(seed);
    const test::BlockLists lists(x.p, x.wish, seed);
    lists.give(x.p);
    cuda::BlockTilePlan plan = cuda::plan_block_tiles(x.p, cuda::shape_of(x.p), x.tile);
    Guarded<char> memory(plan.bytes);
    std::fill(memory.begin(), memory.end(), '\xff');
    plan.bind(memory.data());
    LaunchOptions options;
    options.grid[0] = static_cast<uint32_t>(plan.row_tiles);
    options.threads = traits_of(flashspark::Operation::attention_block_tiles).threads;
    options.seed = seed;
    const BlockTileArguments &a = plan.arguments;
    launch(options, [&a] { derive_block_tiles(a); });
    const int64_t batch = a.by_sequence != 0 ? x.p.num_seqs : 1;
    ASSERT_EQ(plan.row_tiles, batch * a.heads.value * a.row_tiles.value);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < a.heads.value; ++h) {
        for (int64_t r = 0; r < a.row_tiles.value; ++r) check_row_tile(x, lists, a, b, h, r);
      }
    }
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace flashspark::emulator
