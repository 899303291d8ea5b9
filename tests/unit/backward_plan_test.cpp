// The planner of the backward pass: which instance runs a problem.
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <string>
#include <utility>

#include "cuda/backward.hpp"

namespace flashspark::cuda {
namespace {

BackwardParams problem(int64_t head_dim, int64_t head_dim_v, int64_t num_heads, float softcap) {
  BackwardParams b;
  flashspark_attention_backward_params_init(&b);
  Params &p = b.forward;
  p.device = FLASHSPARK_CUDA;
  p.num_seqs = 1, p.num_heads_q = p.num_heads_kv = num_heads;
  p.head_dim = head_dim, p.head_dim_v = head_dim_v;
  p.max_seqlen_q = p.max_seqlen_k = 1024;
  p.softcap = softcap;
  p.q.dtype = FLASHSPARK_BFLOAT16;
  return b;
}

// Else it need not be built. tests/gpu/sanitizer_cases.py finds its problems among such.
TEST(BackwardPlan, EveryInstanceRunsSomeProblem) {
  for (const Machine &machine :
       {Machine{Architecture::sm_90, 132, 50 << 20, 228 << 10}, Machine{Architecture::sm_120f, 48, 24 << 20, 100 << 10},
        Machine{Architecture::sm_120f, 188, 128 << 20, 100 << 10}}) {
    std::set<std::string> chosen;
    for (int64_t head_dim = 8; head_dim <= kMaxBackwardHeadDim; head_dim += 8) {
      for (const int64_t num_heads : {1, 16, 512}) {
        for (const auto &[softcap, dropout, deterministic] :
             {std::tuple{0.0f, 0.0f, 0}, {0.0f, 0.0f, 1}, {10.0f, 0.0f, 0}, {0.0f, 0.1f, 0}}) {
          BackwardParams b = problem(head_dim, head_dim, num_heads, softcap);
          b.forward.dropout_p = dropout;
          b.forward.deterministic = deterministic;
          const bool any = std::any_of(std::begin(kBackwardInstances), std::end(kBackwardInstances),
                                       [&](const BackwardInstance &instance) { return fits(instance, b.forward); });
          if (any) chosen.insert(make_backward_plan(b, machine).instance->name);
        }
      }
    }
    for (const BackwardInstance &instance : kBackwardInstances)
      EXPECT_TRUE(chosen.contains(instance.name)) << instance.name << " on " << machine.sm_count << " SMs";
  }
}

// P comes times the scale there, by what preprocess adds to lse; so nothing behind it knows of the scale.
TEST(BackwardPlan, DropoutAloneScalesProbabilities) {
  const Machine machine{Architecture::sm_120f, 188, 128 << 20, 100 << 10};
  BackwardParams b = problem(128, 128, 16, 0);
  b.forward.dropout_p = 0.5f;
  const BackwardArguments a = make_backward_plan(b, machine).arguments;
  EXPECT_EQ(a.lse_shift, -1);
  EXPECT_EQ(a.delta_scale, -0.5f);  // the sums begin with it
  EXPECT_EQ(a.dropout.scale, 1);
  EXPECT_GT(a.dropout.limit, 0u);
  b.forward.softcap = 5;
  const BackwardArguments of_modified = make_backward_plan(b, machine).arguments;
  EXPECT_EQ(of_modified.lse_shift, 0);
  EXPECT_EQ(of_modified.delta_scale, 1);
  EXPECT_EQ(of_modified.dropout.scale, 2);
}

// Where the query heads of a group fill the SMs only if they are of several CTAs.
TEST(BackwardPlan, HeadsOfAGroupAreOfSeveralCtasOnSmallGrids) {
  const Machine machine{Architecture::sm_90, 132, 50 << 20, 228 << 10};
  BackwardParams b = problem(128, 128, 16, 10);  // with modifications a tile has no pieces
  b.forward.num_heads_kv = 8;
  const auto parts = [&] { return make_backward_plan(b, machine).arguments.head_parts; };
  EXPECT_EQ(parts(), 2);  // 64 CTAs, or 128
  b.forward.deterministic = 1;
  EXPECT_EQ(parts(), 2);  // two sums, which are added to 0 in either order
  b.forward.num_heads_kv = 4;
  EXPECT_EQ(parts(), 2);
  b.forward.deterministic = 0;
  EXPECT_EQ(parts(), 4);
  b.forward.num_heads_kv = 8, b.forward.max_seqlen_q = b.forward.max_seqlen_k = 2048;
  EXPECT_EQ(parts(), 1);  // 128 CTAs, or 256 of half as many rows: as good
  b.forward.causal = 1;
  EXPECT_EQ(parts(), 2);  // the longest of 128 CTAs has twice the rows of the mean
  b.forward.num_seqs = 8;
  EXPECT_EQ(parts(), 1);
}

// Else few CTAs would have most of the work, or a last round of CTAs leave SMs idle.
TEST(BackwardPlan, SmallGridsHaveEqualPartsOfTiles) {
  const Machine machine{Architecture::sm_90, 132, 50 << 20, 228 << 10};
  BackwardParams b = problem(128, 128, 16, 0);
  Params &p = b.forward;
  const auto pieces = [&] { return make_backward_plan(b, machine).arguments.num_pieces; };
  EXPECT_EQ(pieces(), 0);  // 128 equal tiles, one of each SM but four
  p.causal = 1;
  EXPECT_EQ(pieces(), 132);
  p.deterministic = 1;
  EXPECT_EQ(pieces(), 128);  // quarters of walks over pairs of tiles
  p.deterministic = 0, p.causal = 0, p.num_heads_kv = 8;
  EXPECT_EQ(pieces(), 128);  // 64 equal tiles in two halves each
  p.causal = 1;
  EXPECT_EQ(pieces(), 132);
  p.max_seqlen_q = p.max_seqlen_k = 2048;
  EXPECT_EQ(pieces(), 132);
  p.num_seqs = 8;  // 1024 tiles: the longest come first
  EXPECT_EQ(pieces(), 0);
  p.num_seqs = 1, p.max_seqlen_q = p.max_seqlen_k = 128;
  EXPECT_EQ(pieces(), 0);  // pieces would be short
  p.causal = 0, p.max_seqlen_q = 1024;
  EXPECT_EQ(pieces(), 88);  // no shorter than 192 rows, and what a tile takes beside them
  p.causal = 1, p.max_seqlen_k = 1024, p.window_left = 100;
  EXPECT_EQ(pieces(), 132);
  p.seqused_q = reinterpret_cast<const int32_t *>(16);
  EXPECT_EQ(pieces(), 0);  // lengths may differ
}

// They take another dq, and CTAs do not wait for each other.
TEST(BackwardPlan, DeterministicSumsAreOfWalksOnSmallGrids) {
  const Machine machine{Architecture::sm_90, 132, 50 << 20, 228 << 10};
  BackwardParams b = problem(128, 128, 16, 0);
  Params &p = b.forward;
  p.deterministic = 1, p.num_heads_kv = 8;
  float dq = 0;
  b.dq.data = &dq;
  const auto plan = [&] { return make_backward_plan(b, machine); };
  const auto has_walks = [&](int32_t walks, int32_t heads, int32_t parts) {
    const BackwardArguments a = plan().arguments;
    EXPECT_EQ(a.num_walks, walks);
    EXPECT_EQ(a.walk_heads, heads);
    EXPECT_EQ(a.walk_parts, parts);
  };
  has_walks(8, 1, 1);
  EXPECT_EQ(plan().arguments.dq_sum_rows, 16 * 1024);
  EXPECT_EQ(plan().dq_bytes, size_t{2} * 16 * 1024 * 128 * 4);
  EXPECT_EQ(plan().arguments.num_pieces, 128);
  p.causal = 1;
  has_walks(4, 2, 4);
  EXPECT_EQ(plan().arguments.num_slots, 96);  // the others end tiles
  p.max_seqlen_q = p.max_seqlen_k = 2048;
  has_walks(8, 2, 2);
  p.causal = 0;
  has_walks(16, 2, 1);
  EXPECT_EQ(plan().piece_bytes, 0u);
  p.max_seqlen_q = p.max_seqlen_k = 4128;  // an odd number of blocks of rows
  has_walks(0, 0, 0);
  EXPECT_EQ(plan().tile->order, SumOrder::turns);
  EXPECT_EQ(plan().arguments.dq_sum_rows, 0);
  EXPECT_EQ(plan().dq_bytes, size_t{16} * 4128 * 128 * 4);
  p.max_seqlen_q = p.max_seqlen_k = 1024;
  p.window_left = 300;
  has_walks(0, 0, 0);
  p.window_left = -1, p.seqused_k = reinterpret_cast<const int32_t *>(16);  // lengths may differ
  has_walks(0, 0, 0);
  p.seqused_k = nullptr, p.causal = 1, p.num_heads_kv = 2;  // two of eight query heads are of a CTA
  has_walks(4, 2, 4);
  EXPECT_EQ(plan().arguments.num_slots, 2 * (128 - 8));
  p.max_seqlen_q = 960;
  has_walks(0, 0, 0);
  p.deterministic = 0;
  EXPECT_EQ(plan().tile->order, SumOrder::unordered);
}

TEST(BackwardPlan, HeadsTakeTurnsInSectionsOfEqualSize) {
  const Machine machine{Architecture::sm_90, 132, 50 << 20, 228 << 10};
  const auto section = [&](int64_t heads) {
    return make_backward_plan(problem(128, 128, heads, 0), machine).arguments.section_heads;
  };
  EXPECT_EQ(section(20), 20);  // few CTAs an SM
  EXPECT_EQ(section(256), 8);
  EXPECT_EQ(section(257), 8);  // 33 sections
  EXPECT_EQ(section(100), 8);
}

}  // namespace
}  // namespace flashspark::cuda
