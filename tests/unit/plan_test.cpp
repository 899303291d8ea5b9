// The planner: what it decides for a few problems on a given GPU, how a plan is bound, and how it prints itself.
#include "cuda/plan.hpp"

#include <gtest/gtest.h>

#include <sstream>

#include "cuda/heuristics.hpp"

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
