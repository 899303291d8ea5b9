// flashspark_create_block_mask on the CPU against the oracle, score by score; its rules; and how a GPU's kernel is
// planned.
#include <gtest/gtest.h>

#include <functional>
#include <memory>

#include "cuda/block_mask.hpp"
#include "support/block_masks.hpp"
#include "support/named_graphs.hpp"
#include "support/random_graph.hpp"

namespace flashspark {
namespace {

using test::expected_lists;
using test::mask_params;
using test::MaskLists;
using test::MaskShape;
using test::NamedFunctions;

void expect_lists(const MaskShape &shape, const graph::Graph &graph, const graph::Bindings &bindings,
                  const std::string &name) {
  const test::Function function(graph, false, bindings);
  const MaskLists expected = expected_lists(shape, graph, bindings);
  for (const int32_t threads : {1, 4}) {
    MaskLists got;
    flashspark_block_mask_params p = mask_params(shape, function.get(), got);
    p.num_threads = threads;
    ASSERT_EQ(flashspark_create_block_mask(&p), FLASHSPARK_OK) << flashspark_last_error();
    EXPECT_EQ(got, expected) << name << ", " << shape.text() << ", " << threads << " threads";
  }
}

TEST(BlockMask, OfNamedFunctions) {
  for (const NamedFunctions &functions : test::mask_functions()) {
    const graph::Graph graph = *functions.mask();
    const test::Captures captures(graph, 3);
    for (const MaskShape &shape : test::mask_shapes()) expect_lists(shape, graph, captures.get(), functions.name);
  }
}

graph::Graph graph_of(const NamedFunctions::Body &body) {
  return *NamedFunctions::graph_of(body);
}

// What depends on nothing, on rows alone, on keys alone; on sequences and heads, which get copies elsewhere.
TEST(BlockMask, OfFunctionsThatReadLittle) {
  using In = const test::Inputs &;
  const std::pair<const char *, NamedFunctions::Body> bodies[] = {
      {"everything", [](In f) { return f.q() >= 0; }},
      {"nothing", [](In f) { return f.q() < 0; }},
      {"constant", [](In f) { return test::Expr{f.graph, f.graph->add_const(graph::Type::boolean, 1)}; }},
      {"rows", [](In f) { return f.q() % 3 != 1; }},
      {"keys", [](In f) { return f.kv() >= 64; }},
      {"sequences", [](In f) { return f.kv() < f.b() * 64 + 16; }},
      {"heads", [](In f) { return (f.h() & 1) == 0; }},
      {"both", [](In f) { return f.q() + f.b() * 10 >= f.kv() + f.h() * 7; }},
      {"lengths", [](In f) { return f.pos() >= f.kv(); }},
      {"offsets", [](In f) { return f.input(graph::Op::OffsetQ) == f.input(graph::Op::OffsetK); }}};
  for (const auto &[name, body] : bodies) {
    for (const MaskShape &shape : test::mask_shapes()) expect_lists(shape, graph_of(body), {}, name);
  }
}

// Indices outside captured tensors read the nearest element, and are no error.
TEST(BlockMask, OfRandomFunctions) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    test::GraphWish wish;
    wish.result = graph::Type::boolean, wish.depth = static_cast<int>(2 + seed % 6), wish.max_magnitude = 8;
    const test::RandomGraph random(seed, wish);
    const std::vector<MaskShape> shapes = test::mask_shapes();
    expect_lists(shapes[seed % shapes.size()], random.graph, random.bindings(), "random " + std::to_string(seed));
  }
}

// More keys and rows than a tile has, in blocks that are larger, too.
TEST(BlockMask, OfLongSequences) {
  const graph::Graph causal = *test::named("causal").mask();
  expect_lists({1, 1, 600, 600, 300, 600}, causal, {}, "causal");
  expect_lists({1, 1, 5, 3000, 4, 2500}, graph_of([](const test::Inputs &f) { return f.kv() < 2499; }), {}, "keys");
  expect_lists({1, 1, 5, 5000, 5, 2500}, graph_of([](const test::Inputs &f) { return f.kv() < 2500; }), {}, "half");
}

class BlockMaskRules : public testing::Test {
 protected:
  void expect_refusal(const std::string &text, const std::function<void(flashspark_block_mask_params &)> &change) {
    flashspark_block_mask_params p = mask_params({1, 1, 64, 64, 16, 16}, function_.get(), lists_);
    change(p);
    EXPECT_NE(flashspark_create_block_mask(&p), FLASHSPARK_OK) << text;
    EXPECT_NE(std::string(flashspark_last_error()).find(text), std::string::npos)
        << flashspark_last_error() << "\nhas not: " << text;
  }
  graph::Graph graph_ = *test::named("window").mask();
  test::Captures captures_{graph_, 1};
  test::Function function_{graph_, false, captures_.get()};
  MaskLists lists_;
};

TEST_F(BlockMaskRules, NameTheArgument) {
  using P = flashspark_block_mask_params &;
  expect_refusal("flashspark_block_mask_params: struct_size = 3", [](P p) { p.struct_size = 3; });
  expect_refusal("device = 7: must be 0 (CPU) or 1 (CUDA)", [](P p) { p.device = 7; });
  expect_refusal("mask_mod.mod = NULL: must be given", [](P p) { p.mask_mod.mod = nullptr; });
  expect_refusal("mask_mod: the graph reads 1 captured tensors", [](P p) { p.mask_mod.num_tensors = 0; });
  expect_refusal("num_seqs = 0: must be from 1", [](P p) { p.num_seqs = 0; });
  expect_refusal("num_heads = -1: must be from 1", [](P p) { p.num_heads = -1; });
  expect_refusal("seqlen_q = 0: must be from 1 to 1073741824", [](P p) { p.seqlen_q = 0; });
  expect_refusal("seqlen_k = 1073741825: must be from 1 to 1073741824", [](P p) { p.seqlen_k = (1 << 30) + 1; });
  expect_refusal("block_size_q = 0: must be from 1", [](P p) { p.block_size_q = 0; });
  expect_refusal("block_size_k = -16: must be from 1", [](P p) { p.block_size_k = -16; });
  expect_refusal("num_seqs = 65536: must be below 2^31 together with num_heads = 65536",
                 [](P p) { p.num_seqs = p.num_heads = 1 << 16; });
  expect_refusal("masked_counts = NULL: must point to the result", [](P p) { p.masked_counts = nullptr; });
  expect_refusal("masked_indices = NULL: must point to the result", [](P p) { p.masked_indices = nullptr; });
  expect_refusal("full_indices = NULL: must be given with full_counts", [](P p) { p.full_indices = nullptr; });
  expect_refusal("must be NULL without full_counts", [](P p) { p.full_counts = nullptr; });
  expect_refusal("must be aligned to 4 bytes",
                 [](P p) { p.full_counts = reinterpret_cast<int32_t *>(reinterpret_cast<char *>(p.full_counts) + 1); });
  EXPECT_EQ(flashspark_create_block_mask(nullptr), FLASHSPARK_INVALID_ARGUMENT);
}

TEST_F(BlockMaskRules, AScoreFunctionIsRefused) {
  const graph::Graph softcap = *test::named("softcap").score();
  const test::Function score(softcap, true, {});
  expect_refusal("mask_mod.mod = a score function: must be made by flashspark_mask_mod_create()",
                 [&](flashspark_block_mask_params &p) { p.mask_mod = score.get(); });
}

// A CTA for each row of lists that differs; keys of a lane by the size of blocks.
TEST(BlockMaskPlan, FollowsTheFunctionAndTheBlocks) {
  const graph::Graph by_head = graph_of([](const test::Inputs &f) { return f.kv() < f.h(); });
  const test::Function function(by_head, false, {});
  MaskLists lists;
  flashspark_block_mask_params p = mask_params({4, 6, 1000, 1000, 128, 128}, function.get(), lists);
  cuda::BlockMaskPlan plan = cuda::make_block_mask_plan(p);
  EXPECT_EQ(plan.launch.grid[0], 6u * 8);
  EXPECT_EQ(plan.arguments.asked_seqs, 1);
  EXPECT_TRUE(plan.arguments.ragged_q && plan.arguments.ragged_k && !plan.wide_positions);
  EXPECT_EQ(plan.lane_keys, 4);
  EXPECT_EQ(plan.launch.shared_bytes, block_mask_shared_bytes(1));
  p.block_size_k = 64, p.seqlen_k = (1 << 23) + 64;
  plan = cuda::make_block_mask_plan(p);
  EXPECT_TRUE(plan.lane_keys == 2 && plan.wide_positions && !plan.arguments.ragged_k);
  p.block_size_k = 16;
  EXPECT_EQ(cuda::make_block_mask_plan(p).lane_keys, 1);
  p.block_size_q = p.block_size_k = INT32_MAX;
  EXPECT_EQ(cuda::make_block_mask_plan(p).arguments.block_size_k, p.seqlen_k);
  EXPECT_LE(block_mask_shared_bytes(8192), 48u << 10);
  EXPECT_LE(block_mask_shared_bytes(64), 48u << 10);
  EXPECT_LE(block_mask_shared_bytes(1024), 48u << 10);
}

}  // namespace
}  // namespace flashspark
