// The backward kernels against the formula: every kernel, every feature, in allocations of exact size.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "backward/problem.hpp"
#include "backward/random_spec.hpp"
#include "dtype.hpp"

namespace flashspark::emulator {
namespace {

// smallest: what kernels have in common is tried with the quickest. ordered: those that sum dq in an order of their
// own.
enum class Kernels { all, smallest, ordered };

bool is_among(const BackwardKernel &kernel, Kernels which) {
  const BackwardTile &tile = kernel.instance->sm_120f;
  if (which == Kernels::smallest) return kernel.instance->head_dim <= 64;
  return which == Kernels::all || tile.order == SumOrder::turns || tile.order == SumOrder::walks ||
         tile.sharing == KeySharing::columns;
}

// Runs every kernel that can take it, with a head as wide as the kernel's unless the spec has another.
void check(BackwardSpec spec, uint64_t seed, Kernels which = Kernels::all, bool own_width = true) {
  for (const BackwardKernel &kernel : backward_kernels()) {
    if (!is_among(kernel, which)) continue;
    if (own_width) spec.head_dim = kernel.instance->head_dim, spec.head_dim_v = kernel.instance->head_dim_v;
    if (!can_run(kernel, spec)) continue;
    Counters counters;
    EXPECT_EQ(check_backward(spec, kernel, seed, &counters), "");
    EXPECT_EQ(counters.bank_conflicts, 0u) << name_of(kernel);
  }
}

TEST(Backward, WholeTiles) {
  BackwardSpec s;
  s.tokens = {128}, s.keys = {128};
  check(s, 1);
}

TEST(Backward, RaggedTiles) {
  BackwardSpec s;
  for (const int32_t tokens : {1, 17, 70}) {
    for (const int32_t keys : {1, 33, 130}) {
      s.tokens = {tokens}, s.keys = {keys};
      check(s, static_cast<uint64_t>(tokens * 1000 + keys));
    }
  }
}

TEST(Backward, Masks) {
  struct Mask {
    bool causal;
    int64_t left, right;
  };
  uint64_t seed = 10;
  for (const Mask &mask :
       {Mask{true, -1, -1}, Mask{true, 40, -1}, Mask{false, 20, 10}, Mask{false, -1, 5}, Mask{false, 7, -1}}) {
    for (const auto &[tokens, keys] : {std::pair{100, 140}, std::pair{150, 90}, std::pair{64, 256}}) {
      BackwardSpec s;
      s.tokens = {tokens}, s.keys = {keys};
      s.causal = mask.causal, s.window_left = mask.left, s.window_right = mask.right;
      check(s, ++seed);
    }
  }
}

TEST(Backward, NarrowHeads) {
  for (const int64_t width : {8, 40, 64, 80, 104, 136, 200}) {
    BackwardSpec s;
    s.head_dim = width, s.head_dim_v = width == 80 ? 72 : width == 200 ? 128 : width;
    s.tokens = {70}, s.keys = {130};
    check(s, static_cast<uint64_t>(width), Kernels::all, false);
  }
}

TEST(Backward, SharedKeys) {
  BackwardSpec s;
  s.tokens = {70, 20}, s.keys = {130, 260};
  s.heads_q = 6, s.heads_kv = 2, s.causal = true;
  check(s, 3);
  s.heads_q = 3, s.heads_kv = 1, s.heads_first = true;
  check(s, 4);
}

// CTAs then add to dq by turns; the emulator fails where one would wait for another that comes later.
TEST(Backward, Deterministic) {
  BackwardSpec s;
  s.deterministic = true;
  s.tokens = {140, 70}, s.keys = {140, 300};
  check(s, 5);
  s.tokens = {300, 70}, s.keys = {300, 400};
  s.causal = true, s.heads_q = 2;
  check(s, 6, Kernels::smallest);
  s.window_left = 30, s.varlen_q = s.varlen_k = true;
  check(s, 7, Kernels::smallest);
  s.window_right = 10, s.causal = false, s.sinks = true;
  check(s, 8, Kernels::smallest);
  s.rswa_window = 40, s.window_left = s.window_right = -1, s.causal = true;  // prefix tiles see all later rows
  check(s, 9, Kernels::smallest);
  s.rswa_window = 0, s.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
  check(s, 10, Kernels::smallest);
  s.prefix_mode = FLASHSPARK_PREFIX_NONE, s.attention_chunk = 64, s.alibi = true;
  check(s, 11, Kernels::smallest);
}

// Loops and orders of their own: rows of several turns and heads, tiles that begin within a turn, keys that no row
// sees.
TEST(Backward, DeterministicOrders) {
  BackwardSpec s;
  s.deterministic = s.causal = true, s.heads_q = 2;
  s.tokens = {420}, s.keys = {330};
  check(s, 12, Kernels::ordered);
  s.tokens = {200}, s.keys = {100};  // the first tile of a head sees rows that no other does
  check(s, 13, Kernels::ordered);
  s.varlen_q = s.varlen_k = true, s.tokens = {290, 70, 0, 150}, s.keys = {200, 300, 10, 40}, s.unused_rows = true;
  check(s, 14, Kernels::ordered);
  s.causal = false;
  check(s, 15, Kernels::ordered);
  s.window_left = 100, s.causal = true;
  check(s, 16, Kernels::ordered);
  s.varlen_q = s.varlen_k = s.unused_rows = false, s.tokens = {300, 300}, s.keys = {260, 260}, s.heads_q = 1;
  check(s, 17, Kernels::ordered);
  s.wanted_q = false;
  check(s, 18, Kernels::ordered);
}

// More heads than take turns at a time, the last section with fewer than the others.
TEST(Backward, ManyHeads) {
  BackwardSpec s;
  s.tokens = {20}, s.keys = {150};
  s.heads_q = s.heads_kv = 17, s.causal = true, s.head_dim = s.head_dim_v = 16;
  BackwardProblem problem(s, 3);
  const cuda::Machine machine{Architecture::sm_120f, s.sm_count, 1 << 20, 100 << 10};
  ASSERT_EQ(cuda::make_backward_plan(problem.params, machine).arguments.section_heads, 6);
  check(s, 3, Kernels::smallest, false);
}

// On so many SMs each query head of a group is of a CTA of its own, and these add up dk and dv.
TEST(Backward, HeadsOfSeveralCtas) {
  BackwardSpec s;
  s.sm_count = 1000;
  s.tokens = {130, 20}, s.keys = {70, 140};
  s.heads_q = 4, s.heads_kv = 2, s.causal = true;
  BackwardProblem problem(s, 5);
  const cuda::Machine machine{Architecture::sm_120f, s.sm_count, 1 << 20, 100 << 10};
  ASSERT_EQ(cuda::make_backward_plan(problem.params, machine).arguments.head_parts, 2);
  check(s, 5);
  s.heads_first = true, s.wanted_q = false;
  check(s, 6, Kernels::smallest);
  s.wanted_q = true, s.wanted_v = false;
  check(s, 7, Kernels::smallest);
  s.wanted_v = true, s.varlen_q = s.varlen_k = true, s.unused_rows = true;
  check(s, 8, Kernels::smallest);
  s.head_dim = 40, s.head_dim_v = 24, s.dropout_p = 0.2f;
  check(s, 9, Kernels::smallest, false);
  s.deterministic = true;  // the sum of two numbers has no order
  BackwardProblem in_order(s, 10);
  ASSERT_EQ(cuda::make_backward_plan(in_order.params, machine).arguments.head_parts, 2);
  check(s, 10, Kernels::smallest, false);
}

// Every CTA has an equal part of all tiles, and leaves its sums of the last tile that it begins to the one that ends
// it.
TEST(Backward, EqualPartsOfTiles) {
  const auto check_pieces = [](const BackwardSpec &s, uint64_t seed, Kernels which) {
    BackwardProblem problem(s, seed);
    const cuda::Machine machine{Architecture::sm_120f, s.sm_count, 1 << 20, 100 << 10};
    EXPECT_GT(cuda::make_backward_plan(problem.params, machine).arguments.num_pieces, 0) << "problem " << seed;
    check(s, seed, which);
  };
  BackwardSpec s;
  s.sm_count = 7;
  s.tokens = {330}, s.keys = {130}, s.heads_q = 2;
  check_pieces(s, 20, Kernels::all);  // a tile is of three CTAs and more
  s.sm_count = 16, s.heads_q = 4, s.heads_kv = 2, s.causal = true;
  s.tokens = {200, 200, 200}, s.keys = {450, 450, 450}, s.heads_first = true;
  check_pieces(s, 21, Kernels::smallest);  // a CTA has several tiles
  s.tokens = {150}, s.keys = {700}, s.window_left = 100;
  check_pieces(s, 22, Kernels::smallest);  // no row sees the first keys
  s.tokens = {700}, s.wanted_q = false;
  check_pieces(s, 23, Kernels::smallest);
  s.wanted_k = false, s.wanted_q = true;
  check_pieces(s, 24, Kernels::smallest);
  s.wanted_v = false, s.wanted_k = true, s.head_dim = 40, s.head_dim_v = 24;
  check(s, 25, Kernels::smallest, false);
  s.heads_q = 2, s.heads_kv = 1, s.wanted_v = true, s.sm_count = 25;
  s.tokens = {180}, s.keys = {4200}, s.window_left = -1, s.dlse = true, s.head_dim = s.head_dim_v = 64;
  check_pieces(s, 26, Kernels::smallest);  // more tiles of a head than a warp has lanes
}

// In turns: every CTA has an equal part of a walk (kernels/backward/walks.cuh).
TEST(Backward, EqualPartsOfWalks) {
  struct Walks {
    int32_t walks, heads, parts;
  };
  const auto check_walks = [](const BackwardSpec &s, uint64_t seed, const Walks &expected) {
    for (const BackwardKernel &kernel : backward_kernels()) {
      if (kernel.instance->sm_120f.order != SumOrder::walks) continue;
      ASSERT_TRUE(can_run(kernel, s)) << "problem " << seed;
      BackwardProblem problem(s, seed);
      const cuda::Machine machine{Architecture::sm_120f, s.sm_count, 1 << 20, 100 << 10};
      const BackwardArguments a = cuda::make_backward_plan(problem.params, machine, kernel.instance).arguments;
      EXPECT_EQ(a.num_walks, expected.walks) << "problem " << seed;
      EXPECT_EQ(a.walk_heads, expected.heads) << "problem " << seed;
      EXPECT_EQ(a.walk_parts, expected.parts) << "problem " << seed;
      EXPECT_EQ(check_backward(s, kernel, seed), "");
    }
  };
  BackwardSpec s;
  s.deterministic = true, s.head_dim = s.head_dim_v = 128, s.heads_q = 2;
  s.tokens = {256}, s.keys = {260}, s.sm_count = 3;
  check_walks(s, 500, {3, 2, 1});  // both heads, one after another
  s.tokens = {250}, s.keys = {200}, s.sm_count = 11, s.heads_q = 2, s.heads_first = true;
  check_walks(s, 501, {2, 1, 2});  // of a head some of the rows
  s.causal = true, s.tokens = s.keys = {440}, s.sm_count = 9, s.dlse = true, s.heads_first = false;
  check_walks(s, 502, {2, 2, 4});  // pairs of tiles, the last one no whole tile; a head upwards, one downwards
  s.tokens = s.keys = {320}, s.heads_q = 4, s.sm_count = 8, s.dlse = false, s.wanted_k = false;
  check_walks(s, 503, {2, 2, 2});  // a tile without another one, and several CTAs for the heads of a group
  s.tokens = s.keys = {170, 170}, s.heads_q = 3, s.head_dim = 72, s.head_dim_v = 104, s.wanted_k = true;
  s.wanted_q = false, s.sm_count = 2;
  check_walks(s, 504, {1, 3, 1});
}

TEST(Backward, Sequences) {
  uint64_t seed = 50;
  for (const bool varlen_q : {false, true}) {
    for (const bool varlen_k : {false, true}) {
      for (const bool unused : {false, true}) {
        BackwardSpec s;
        s.tokens = {70, 0, 3, 129}, s.keys = {40, 70, 0, 129};
        s.varlen_q = varlen_q, s.varlen_k = varlen_k, s.unused_rows = unused;
        s.causal = varlen_q, s.heads_q = 2;  // a causal mask alone drops keys past the last one
        check(s, ++seed, Kernels::smallest);
      }
    }
  }
  // More sequences than lanes, most of them short.
  BackwardSpec s;
  s.tokens.assign(40, 2), s.keys.assign(40, 3);
  s.tokens[35] = 70, s.keys[35] = 140;
  s.varlen_q = s.varlen_k = true;
  check(s, ++seed, Kernels::smallest);
}

TEST(Backward, CausalBySequence) {
  BackwardSpec s;
  s.tokens = {70, 70}, s.keys = {90, 90}, s.causal_per_seq = true;
  check(s, 70, Kernels::smallest);
}

TEST(Backward, LseAndSinks) {
  BackwardSpec s;
  s.tokens = {70, 100}, s.keys = {90, 60}, s.heads_q = 2, s.causal = true;
  s.dlse = true;
  check(s, 80, Kernels::smallest);
  s.sinks = true;
  check(s, 81, Kernels::smallest);
  s.varlen_q = s.varlen_k = s.unused_rows = true;
  check(s, 82, Kernels::smallest);
}

// Rows whose lse says so, whatever keys the call has: of a part of the keys, where the whole row keeps none.
TEST(Backward, RowsWithoutKeys) {
  BackwardSpec s;
  s.tokens = {70}, s.keys = {130};
  s.without_keys = true;
  check(s, 85);
  s.tokens = {70, 33}, s.keys = {90, 60}, s.dlse = s.sinks = true;
  check(s, 86, Kernels::smallest);
}

// What dQ's sums hold there is 0 times infinity.
TEST(Backward, UnusedRowsBesideInfiniteValues) {
  BackwardSpec s;
  s.tokens = {70, 20}, s.keys = {40, 70};
  s.varlen_q = s.varlen_k = s.unused_rows = true;
  for (const BackwardKernel &kernel : backward_kernels()) {
    if (kernel.instance->head_dim > 64) continue;
    s.dtype = kernel.dtype;
    BackwardProblem problem(s, 87);
    const flashspark_attention_params &p = problem.params.forward;
    for (int64_t n = 0; n < p.total_k * s.heads_kv * s.head_dim_v; ++n)
      store_from_float(p.v.data, n, p.v.dtype, INFINITY);
    problem.run(kernel, 87);
    for (int64_t row = 0; row < p.total_q; ++row) {
      bool used = false;
      for (size_t b = 0; b < s.tokens.size(); ++b)
        used |= row >= p.cu_seqlens_q[b] && row < p.cu_seqlens_q[b] + s.tokens[b];
      for (int64_t n = row * s.heads_q * s.head_dim; !used && n < (row + 1) * s.heads_q * s.head_dim; ++n)
        ASSERT_EQ(load_as_float(problem.params.dq.data, n, p.q.dtype), 0) << name_of(kernel) << ", row " << row;
    }
  }
}

TEST(Backward, Softcap) {
  BackwardSpec s;
  s.tokens = {70}, s.keys = {150}, s.causal = true;
  s.softcap = 2.0f;
  check(s, 90);
  s.softcap = 20.0f, s.spread = 4;
  check(s, 91);
}

TEST(Backward, Dropout) {
  uint64_t seed = 100;
  for (const float p : {0.1f, 0.5f, 0.9f}) {
    BackwardSpec s;
    s.tokens = {70, 30}, s.keys = {150, 200}, s.heads_q = 4, s.heads_kv = 2;
    s.dropout_p = p;
    check(s, ++seed);
    s.causal = true, s.softcap = 5;
    check(s, ++seed);
    s.varlen_q = s.varlen_k = true;
    check(s, ++seed);
  }
}

// The instances that have dropout and no other modification, in all that they share with those without dropout.
void check_dropout_alone(BackwardSpec spec, uint64_t seed) {
  for (const BackwardKernel &kernel : backward_kernels()) {
    if (kernel.instance->score_mod != ScoreMod::dropout) continue;
    ASSERT_TRUE(can_run(kernel, spec)) << name_of(kernel);
    Counters counters;
    EXPECT_EQ(check_backward(spec, kernel, seed, &counters), "");
    EXPECT_EQ(counters.bank_conflicts, 0u) << name_of(kernel);
  }
}

TEST(Backward, DropoutAlone) {
  BackwardSpec s;
  s.head_dim = s.head_dim_v = 128, s.dropout_p = 0.15f;
  s.tokens = {300}, s.keys = {128};  // whole blocks one after another
  check_dropout_alone(s, 400);
  s.causal = true, s.tokens = {200, 330}, s.keys = {260, 200}, s.heads_q = 4, s.heads_kv = 2, s.sinks = s.dlse = true;
  check_dropout_alone(s, 401);
  s.varlen_q = s.varlen_k = s.unused_rows = true, s.window_left = 70, s.dropout_p = 0.75f;  // draws say what is kept
  check_dropout_alone(s, 402);
  s = {.head_dim = 72, .head_dim_v = 104, .tokens = {190}, .keys = {150}, .dropout_p = 0.4f, .wanted_q = false};
  check_dropout_alone(s, 403);
}

// On a small grid: query heads of a group in CTAs of their own, and equal parts of all tiles.
TEST(Backward, DropoutOnSmallGrids) {
  const auto plan_of = [](const BackwardSpec &s) {
    BackwardProblem problem(s, 1);
    const cuda::Machine machine{Architecture::sm_120f, s.sm_count, 1 << 20, 100 << 10};
    const cuda::BackwardPlan plan = cuda::make_backward_plan(problem.params, machine);
    EXPECT_EQ(plan.instance->score_mod, ScoreMod::dropout);
    return plan.arguments;
  };
  BackwardSpec s;
  s.head_dim = s.head_dim_v = 128, s.dropout_p = 0.3f;
  s.sm_count = 1000, s.tokens = {130, 20}, s.keys = {70, 140}, s.heads_q = 4, s.heads_kv = 2, s.causal = true;
  EXPECT_EQ(plan_of(s).head_parts, 2);
  check_dropout_alone(s, 410);
  s.sm_count = 7, s.tokens = {330}, s.keys = {130}, s.heads_q = 2, s.heads_kv = 1, s.causal = false;
  EXPECT_GT(plan_of(s).num_pieces, 0);
  check_dropout_alone(s, 411);
  s.sm_count = 16, s.heads_q = 4, s.heads_kv = 2, s.causal = true;
  s.tokens = {200}, s.keys = {450};  // a CTA has pieces of two tiles
  EXPECT_GT(plan_of(s).num_pieces, 0);
  check_dropout_alone(s, 412);
}

constexpr int32_t kPerSeq = FLASHSPARK_PREFIX_PER_SEQ, kPerToken = FLASHSPARK_PREFIX_PER_TOKEN;

TEST(Backward, Alibi) {
  BackwardSpec s;
  s.tokens = {70, 100}, s.keys = {150, 60}, s.heads_q = 4, s.heads_kv = 2, s.alibi = true;
  check(s, 200);
  s.causal = true, s.alibi_per_seq = true;
  check(s, 201, Kernels::smallest);
  s.varlen_q = s.varlen_k = s.unused_rows = true, s.window_left = 30, s.keys[0] = 330;  // many that no row sees
  check(s, 202, Kernels::smallest);
  s.alibi_per_seq = false, s.dropout_p = 0.3f, s.softcap = 3;
  check(s, 203);
  s.wanted_biases = false;
  check(s, 204, Kernels::smallest);
}

TEST(Backward, RelativeBias) {
  BackwardSpec s;
  s.tokens = {70, 100}, s.keys = {150, 60}, s.heads_q = 4, s.heads_kv = 2, s.rel_extent = 50;
  check(s, 210);
  s.causal = true, s.rel_dtype = FLASHSPARK_BFLOAT16, s.rel_extent = 200;
  check(s, 211, Kernels::smallest);
  s.varlen_q = s.varlen_k = s.unused_rows = true, s.window_left = 30, s.rel_dtype = FLASHSPARK_FLOAT16;
  check(s, 212, Kernels::smallest);
  s.dropout_p = 0.3f, s.softcap = 3;
  check(s, 213);
  s.wanted_biases = false;
  check(s, 214, Kernels::smallest);
}

TEST(Backward, PrefixRanges) {
  uint64_t seed = 220;
  for (const int32_t mode : {kPerSeq, kPerToken}) {
    BackwardSpec s;
    s.tokens = {130, 70}, s.keys = {130, 200}, s.causal = true, s.prefix_mode = mode;
    check(s, ++seed);
    s.window_left = 20, s.prefix_clamp_window = true, s.heads_q = 2;
    check(s, ++seed, Kernels::smallest);
    s.prefix_clamp_window = false, s.varlen_q = s.varlen_k = s.unused_rows = true, s.attention_chunk = 40;
    check(s, ++seed, Kernels::smallest);
  }
}

TEST(Backward, Rswa) {
  BackwardSpec s;
  s.tokens = {130, 70}, s.keys = {130, 200}, s.rswa_window = 17;
  check(s, 230);
  s.varlen_q = s.varlen_k = s.unused_rows = true, s.rel_extent = 40, s.alibi = true;
  check(s, 231, Kernels::smallest);
}

TEST(Backward, AttentionChunks) {
  BackwardSpec s;
  s.tokens = {130, 70}, s.keys = {130, 200}, s.attention_chunk = 50;
  check(s, 240);
  s.causal_per_seq = true, s.window_left = 20, s.heads_q = 2;
  check(s, 241, Kernels::smallest);
  s.keys = {90, 33}, s.attention_chunk = 16;
  check(s, 242, Kernels::smallest);
}

TEST(Backward, RandomModifications) {
  std::mt19937_64 rng(20261129);
  const std::span<const BackwardKernel> kernels = backward_kernels();
  for (size_t n = 0, tried = 0; tried < 60; ++n) {
    const BackwardKernel &kernel = kernels[n % kernels.size()];
    BackwardSpec spec = random_spec(rng);
    spec.head_dim = kernel.instance->head_dim, spec.head_dim_v = kernel.instance->head_dim_v;
    if (!can_run(kernel, spec)) continue;
    EXPECT_EQ(check_backward(spec, kernel, 1000 + n), "");
    ++tried;
  }
}

// Whatever metadata says, nothing outside of the tensors is read or written.
TEST(Backward, WildMetadata) {
  std::mt19937_64 rng(20261130);
  for (int n = 0; n < 60; ++n) {
    BackwardSpec s = random_spec(rng);
    s.alibi = true, s.rel_extent = 30, s.varlen_q = n % 2 == 0, s.varlen_k = n % 3 != 0, s.unused_rows = true;
    for (const BackwardKernel &kernel : backward_kernels()) {
      if (std::string(kernel.instance->name) != (n % 8 == 7 ? "d192_mod" : "d64_mod")) continue;
      s.head_dim = kernel.instance->head_dim, s.head_dim_v = kernel.instance->head_dim_v, s.dtype = kernel.dtype;
      BackwardProblem problem(s, static_cast<uint64_t>(n));
      problem.spoil_metadata(rng);
      EXPECT_NO_THROW(problem.run(kernel, static_cast<uint64_t>(n))) << name_of(kernel) << ", " << to_string(s);
      break;
    }
  }
}

TEST(Backward, PeakedScores) {
  BackwardSpec s;
  s.tokens = {130}, s.keys = {130}, s.causal = true;
  s.spread = 8;
  check(s, 110);
}

TEST(Backward, NotWanted) {
  for (int n = 0; n < 7; ++n) {
    BackwardSpec s;
    s.tokens = {70}, s.keys = {130};
    s.wanted_q = n & 1, s.wanted_k = n & 2, s.wanted_v = n & 4;
    check(s, 120, Kernels::smallest);
  }
}

}  // namespace
}  // namespace flashspark::emulator
