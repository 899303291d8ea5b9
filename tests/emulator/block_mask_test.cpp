// The block mask kernel with named and random mask functions against the oracle, score by score, under several orders
// of warps. The lists are allocations of exact size.
#include "mask/block_mask.cuh"

#include <gtest/gtest.h>

#include <memory>

#include "attention/function_mod.cuh"
#include "cuda/block_mask.hpp"
#include "emulator.hpp"
#include "random_functions.hpp"
#include "support/block_masks.hpp"
#include "support/named_graphs.hpp"

#include FLASHSPARK_ALL_FUNCTIONS_FILE

namespace flashspark::emulator {
namespace {

using KernelOf = void (*)(const BlockMaskArguments &);

// A function's kernels: with 1, 2 and 4 keys a lane.
struct Compiled {
  const char *name;
  KernelOf kernels[3];
};

template <class F>
constexpr Compiled compiled(const char *name) {
  using Mask = typename F::Mask;
  if constexpr (Mask::kExists) {
    return {name, {make_block_lists<Mask, 1>, make_block_lists<Mask, 2>, make_block_lists<Mask, 4>}};
  } else {
    return {name, {}};
  }
}
#define FLASHSPARK_EACH(name) compiled<UserFunctions_##name>(#name),
const Compiled kCompiled[] = {FLASHSPARK_ALL_FUNCTIONS(FLASHSPARK_EACH)};
#undef FLASHSPARK_EACH

std::vector<Compiled> with_masks() {
  std::vector<Compiled> found;
  for (const Compiled &each : kCompiled) {
    if (each.kernels[0] != nullptr) found.push_back(each);
  }
  return found;
}

// The graph is the one that the source was written of; a function with a score has the mask's tensors behind the
// score's there, and here none.
void compare(const Compiled &with, const graph::Graph &graph, const graph::Bindings &bindings, int32_t first_tensor,
             int32_t first_scalar, const test::MaskShape &shape, uint64_t seed) {
  const test::Function function(graph, false, bindings);
  test::MaskLists got;
  const flashspark_block_mask_params p = test::mask_params(shape, function.get(), got);
  const cuda::BlockMaskPlan plan = cuda::make_block_mask_plan(p);
  const auto arguments = std::make_unique<BlockMaskArguments>(plan.arguments);
  FunctionArguments &f = arguments->functions;
  std::copy_n(plan.arguments.functions.tensors, kMaxCapturedTensors, f.tensors + first_tensor);
  std::copy_n(plan.arguments.functions.scalars, kMaxCapturedScalars, f.scalars + first_scalar);
  const KernelOf kernel = with.kernels[plan.lane_keys / 2];
  LaunchOptions options{.threads = plan.launch.threads, .shared_bytes = plan.launch.shared_bytes, .seed = seed};
  options.grid[0] = plan.launch.grid[0];
  launch(options, [&] { kernel(*arguments); });
  EXPECT_EQ(got, test::expected_lists(shape, graph, bindings))
      << with.name << ", " << shape.text() << ", seed " << seed;
}

class BlockMaskKernel : public testing::TestWithParam<Compiled> {};

TEST_P(BlockMaskKernel, MakesTheOraclesLists) {
  const std::string name = GetParam().name;
  const std::vector<test::MaskShape> shapes = test::mask_shapes();
  if (name.starts_with("random_")) {
    const uint64_t number = std::stoull(name.substr(7));
    const RandomFunctions random(number);
    return compare(GetParam(), random.mask, random.mask_graph.bindings(), random.score.num_tensors,
                   random.score.num_scalars, shapes[number % shapes.size()], number);
  }
  const test::NamedFunctions functions = test::named(name);
  const graph::Graph graph = *functions.mask(), score = functions.score().value_or(graph::Graph{});
  const test::Captures captures(graph, 3);
  for (size_t n = 0; n < shapes.size(); ++n)
    compare(GetParam(), graph, captures.get(), score.num_tensors, score.num_scalars, shapes[n], n);
}
INSTANTIATE_TEST_SUITE_P(All, BlockMaskKernel, testing::ValuesIn(with_masks()),
                         [](const auto &each) { return std::string(each.param.name); });

// Several rounds of key blocks: each list goes on where the round before has ended.
TEST(BlockMaskKernels, MakeLongRows) {
  for (const Compiled &each : with_masks()) {
    const std::string name = each.name;
    if (name != "causal" && name != "documents") continue;
    const graph::Graph graph = *test::named(name).mask();
    const test::Captures captures(graph, 3);
    compare(each, graph, captures.get(), 0, 0, {1, 1, 3, 2 * kBlockMaskRound + 37, 2, 1}, 1);
    compare(each, graph, captures.get(), 0, 0, {1, 1, 700, 2 * kBlockMaskRound * 2 + 5, 700, 2}, 2);
  }
}

}  // namespace
}  // namespace flashspark::emulator
