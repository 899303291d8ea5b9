// The planner: what it decides for a few problems on a given GPU, how a plan is bound, and how it prints itself.
#include "cuda/plan.hpp"

#include <gtest/gtest.h>

#include <sstream>
#include <string_view>
#include <utility>

#include "cuda/arguments.hpp"
#include "cuda/heuristics.hpp"
#include "error.hpp"

namespace flashspark::cuda {
namespace {

constexpr Machine kH100{Architecture::sm_90, 132, 50 << 20, 228 << 10};
constexpr Machine kGb10{Architecture::sm_120f, 48, 24 << 20, 100 << 10};

Params problem(int64_t num_seqs, int64_t seqlen_q, int64_t seqlen_k) {
  Params p;
  flashspark_attention_params_init(&p);
  p.device = FLASHSPARK_CUDA;
  p.num_seqs = num_seqs, p.num_heads_q = 16, p.num_heads_kv = 4, p.head_dim = p.head_dim_v = 128;
  p.max_seqlen_q = seqlen_q, p.max_seqlen_k = seqlen_k;
  for (flashspark_tensor *t : {&p.q, &p.k, &p.v, &p.out}) t->dtype = FLASHSPARK_BFLOAT16;
  return p;
}

TEST(Plan, Prints) {
  EXPECT_EQ(to_string(make_plan(problem(4, 4096, 4096), kH100)),
            "attention_forward_d128_prefill_bf16: grid 2048 x 1 x 1, 128 threads, 98304 bytes of shared memory, "
            "tile 128 x 64, 1 split\n");
  Params splits = problem(4, 1, 65536);
  splits.num_splits = 4;
  EXPECT_EQ(to_string(make_plan(splits, kGb10)),
            "attention_forward_d128_decode_bf16: grid 16 x 4 x 1, 128 threads, 69760 bytes of shared memory, "
            "tile 16 x 64, 4 splits\n"
            "scratch memory: 528384 bytes, 64 partial results of 16 x 128\n"
            "attention_forward_combine_bf16: grid 16 x 1 x 1, 256 threads, 4224 bytes of shared memory\n");
  Params decode = problem(4, 1, 65536);
  int32_t metadata = 0;
  decode.scheduler_metadata = &metadata, decode.scheduler_metadata_size = 1 << 20;
  std::ostringstream text;
  text << make_plan(decode, kH100);
  EXPECT_EQ(text.str(),
            "attention_forward_d128_decode_bf16: grid 264 x 1 x 1, 128 threads, 69760 bytes of shared memory, "
            "tile 16 x 64, Stream-K over 264 CTAs (132 below 1320 key tiles), with scheduler metadata\n"
            "scratch memory: 4359168 bytes, 528 partial results of 16 x 128\n"
            "attention_forward_combine_bf16: grid 16 x 1 x 1, 256 threads, 4224 bytes of shared memory\n");
}

// What dropout keeps of a row is small enough for as many CTAs as without it.
TEST(Plan, TwoCtasWithDropoutFitAnSm) {
  Params p = problem(4, 4096, 4096);
  p.dropout_p = 0.1f;
  const Plan plan = make_plan(p, kGb10);
  EXPECT_TRUE(plan.instance->name == std::string_view("d128_prefill") && plan.functions->dropout);
  EXPECT_EQ(kGb10.shared_bytes_per_sm / (plan.forward.shared_bytes + kReservedSharedBytes), 2);
}

TEST(Plan, NothingToComputeIsAnEmptyPlan) {
  Params rows = problem(4, 0, 100);
  int32_t offsets = 0;
  rows.cu_seqlens_q = &offsets, rows.total_q = 7;  // max_seqlen_q bounds what the offsets say
  rows.num_splits = 2;
  for (const Params &p : {problem(0, 5, 100), problem(4, 0, 100), rows}) {
    const Plan plan = make_plan(p, kGb10);
    EXPECT_EQ(plan.forward.grid[0], 0u);
    EXPECT_EQ(plan.workspace, 0u);
    EXPECT_EQ(plan.schedule_size(), 0);
    EXPECT_EQ(to_string(plan), "");
  }
}

constexpr int32_t kNoNumbers = 0;  // of lists that nobody reads

Params with_blocks(int64_t tokens, int64_t keys, int64_t heads, int64_t length = 1024) {
  Params p = problem(2, length, length);
  p.full_blocks.counts = &kNoNumbers;
  p.full_blocks.count_block_stride = 3;
  p.block_size_q = tokens, p.block_size_k = keys;
  p.num_blocks_q = (length + tokens - 1) / tokens, p.block_batch = 1, p.block_heads = heads;
  return p;
}

// Lists take a tiling whose row tile lies in one query block and whose key tile lies in one key block.
TEST(Plan, BlockListsTakeATileThatDividesTheirBlocks) {
  for (const Machine &machine : {kH100, kGb10}) {
    for (const int64_t heads : {1, 16}) {
      for (const auto &[tokens, keys] : {std::pair{128, 128}, {64, 64}, {64, 192}, {1024, 64}}) {
        const Plan plan = make_plan(with_blocks(tokens, keys, heads), machine);
        ASSERT_TRUE(plan.functions && plan.functions->block_sparse && plan.block_tiles() == nullptr);
        const int64_t group = plan.arguments.group.value;
        EXPECT_EQ(group, heads == 1 ? 4 : 1);
        EXPECT_EQ(tokens % (plan.tile->rows() / group), 0) << tokens << " " << keys << " " << heads;
        EXPECT_EQ(plan.functions->arguments.blocks.tiles_per_block.value * plan.tile->keys, keys);
        EXPECT_EQ(plan.arguments.stream_k.ctas, 0);
        EXPECT_EQ(plan.block_tiles_launch().grid[0], 0u);
        EXPECT_EQ(plan.workspace, 0u);
      }
    }
  }
}

// Other blocks, and those of padded sequences: the usual kernel over lists of its tiles, which lie in scratch memory.
TEST(Plan, ListsOfTilesAreDerivedWhereBlocksDoNotFit) {
  for (const Machine &machine : {kH100, kGb10}) {
    for (const auto &[tokens, keys, padded] :
         {std::tuple{16, 16, false}, {128, 48, false}, {48, 112, false}, {80, 1 << 20, true}, {128, 128, true}}) {
      for (const int64_t heads : {1, 16}) {
        Params p = with_blocks(tokens, keys, heads);
        if (padded) p.leftpad_k = &kNoNumbers;
        EXPECT_EQ(unsupported(p), "");
        Plan plan = make_plan(p, machine);
        ASSERT_TRUE(plan.functions && plan.functions->block_sparse && plan.block_tiles() != nullptr);
        EXPECT_EQ(plan.instance, make_plan(with_blocks(1024, 1024, heads), machine).instance) << "the usual one";
        const int64_t tile_tokens = plan.tile->rows() / plan.arguments.group.value, row_tiles = 1024 / tile_tokens;
        const int64_t lists = heads * (padded ? 2 : 1) * row_tiles, key_tiles = 1024 / plan.tile->keys;
        EXPECT_EQ(plan.block_tiles_launch().grid[0], static_cast<uint32_t>(lists));
        const BlockTileArguments &a = plan.block_tiles()->arguments;
        EXPECT_EQ(a.by_sequence != 0, padded);
        EXPECT_EQ(a.row_tile_stride % 16, 0);
        EXPECT_EQ(static_cast<int64_t>(plan.workspace), lists * (a.row_tile_stride + 8 * (1 + key_tiles)));
        EXPECT_EQ(a.lists[0].counts, nullptr);
        EXPECT_EQ(a.lists[1].counts, &kNoNumbers);
        EXPECT_EQ(a.lists[1].count_block_stride, 3);
        // What the forward kernel reads is what that launch writes.
        std::vector<char> memory(plan.workspace);
        plan.bind(memory.data());
        const BlockSparseArguments &b = plan.functions->arguments.blocks;
        EXPECT_EQ(b.statuses.data, a.statuses);
        EXPECT_TRUE(b.masked.counts == a.counts[0] && b.full.counts == a.counts[1]);
        EXPECT_TRUE(b.masked.indices == a.indices[0] && b.full.indices == a.indices[1]);
        EXPECT_EQ(static_cast<void *>(a.indices[1] + lists * key_tiles), memory.data() + memory.size());
        EXPECT_EQ(b.full.count_head_stride, heads > 1 ? row_tiles : 0);
        EXPECT_EQ(b.full.index_batch_stride, padded ? heads * row_tiles * key_tiles : 0);
        EXPECT_EQ(b.last_key_block + 1, key_tiles);
        EXPECT_EQ(b.tiles_per_block.value, 1u);
      }
    }
  }
}

TEST(Plan, PrintsTheLaunchThatDerivesLists) {
  Params p = with_blocks(48, 48, 1);
  p.num_splits = 2;
  EXPECT_EQ(
      to_string(make_plan(p, kGb10)),
      "attention_block_tiles: grid 32 x 1 x 1, 128 threads, 0 bytes of shared memory\n"
      "scratch memory: 9984 bytes, lists of its tiles from those of blocks\n"
      "attention_forward_d128_prefill_bf16: grid 256 x 2 x 1, 128 threads, 49152 bytes of shared memory, compiled "
      "at run time, over block lists of its tiles, tile 128 x 32, 2 splits\n"
      "scratch memory: 33816576 bytes, 512 partial results of 128 x 128\n"
      "attention_forward_combine_bf16: grid 256 x 16 x 1, 256 threads, 4224 bytes of shared memory\n");
}

// The most query blocks that a row tile touches, wherever it begins.
TEST(Plan, RowTilesTouchSoManyBlocks) {
  for (const int64_t block : {16, 32, 48, 64, 80, 112, 128, 144, 1024}) {
    const Plan plan = make_plan(with_blocks(block, 16, 16, 4096), kGb10);
    if (plan.block_tiles() == nullptr) continue;
    const int64_t tokens = plan.tile->rows() / plan.arguments.group.value;
    int64_t most = 0;
    for (int64_t first = 0; first < 100000; first += tokens)
      most = std::max(most, (first + tokens - 1) / block - first / block + 1);
    EXPECT_EQ(plan.block_tiles()->arguments.tile_blocks, most) << block;
  }
}

TEST(Plan, DerivedListsOfMoreThanAGibibyteAreRefused) {
  Params p = with_blocks(16, 16, 16, 1 << 16);
  EXPECT_GT(make_plan(p, kGb10).workspace, size_t{1} << 27);
  p = with_blocks(16, 16, 16, 1 << 19);
  try {
    make_plan(p, kGb10);
    FAIL();
  } catch (const Error &error) {
    EXPECT_EQ(error.status(), FLASHSPARK_UNSUPPORTED);
    EXPECT_NE(std::string(error.what()).find("more than 1 GiB"), std::string::npos) << error.what();
  }
}

TEST(Plan, BindLaysPartialResultsIntoItsMemory) {
  for (const int32_t num_splits : {0, 1, 4}) {
    Params p = problem(4, 1, 65536);
    p.num_splits = num_splits;
    Plan plan = make_plan(p, kGb10);
    std::vector<float> memory(plan.workspace / sizeof(float));
    plan.bind(memory.data());
    const ForwardArguments &a = plan.arguments;
    if (num_splits == 1) {
      EXPECT_EQ(plan.workspace, 0u);
      EXPECT_EQ(a.partial_out, nullptr);
      EXPECT_EQ(a.partial_lse, nullptr);
      continue;
    }
    EXPECT_EQ(a.partial_out, memory.data());
    EXPECT_EQ(a.partial_lse, memory.data() + plan.partial_slots * a.tile_rows * a.partial_columns);
    EXPECT_EQ(a.partial_lse + plan.partial_slots * a.tile_rows, memory.data() + memory.size());
  }
}

// Every problem finds an instance: the planner dereferences what it finds.
TEST(Plan, EveryWidthHasAKernel) {
  for (const Machine &machine : {kH100, kGb10}) {
    for (int64_t head_dim = 8; head_dim <= kMaxHeadDim; head_dim += 8) {
      for (int64_t head_dim_v = 8; head_dim_v <= kMaxHeadDim; head_dim_v += 8) {
        for (const int64_t rows : {1, 20, 4096}) {
          for (const float softcap : {0.0f, 30.0f}) {
            Params p = problem(2, rows, 4096);
            p.head_dim = head_dim, p.head_dim_v = head_dim_v, p.softcap = softcap;
            const Plan plan = make_plan(p, machine);
            ASSERT_NE(plan.instance, nullptr);
            ASSERT_TRUE(fits(*plan.instance, p)) << plan;
            ASSERT_GE(plan.forward.grid[2] * plan.instance->head_dim_v, head_dim_v) << plan;
          }
        }
      }
    }
  }
}

TEST(Plan, SplitsStayWithinTheirLimits) {
  for (const int64_t num_seqs : {1, 4, 300}) {
    for (const int64_t keys : {1, 64, 4096, 1 << 20}) {
      for (const int32_t splits : {0, 2, 100, 1024}) {
        Params p = problem(num_seqs, 512, keys);
        p.num_splits = splits;
        const Plan plan = make_plan(p, kH100);
        ASSERT_GE(plan.arguments.num_splits, 1);
        ASSERT_LE(plan.arguments.num_splits, kMaxSplits);
        ASSERT_LE(plan.workspace, static_cast<size_t>(2 * kMaxScratchBytes));
        if (plan.arguments.num_splits > 1 && splits == 0) {
          ASSERT_GE(keys, heuristics_of(kH100.arch).min_split_keys);
        }
      }
    }
  }
}

}  // namespace
}  // namespace flashspark::cuda
