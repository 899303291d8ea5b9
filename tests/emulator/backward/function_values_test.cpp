// The CUDA source of functions' gradients, compiled for the host, against the oracle: all named functions, and random
// graphs.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "backward/function_mod.cuh"
#include "cases/random.hpp"
#include "cuda/function_plan.hpp"
#include "graph/derivative.hpp"
#include "graph/evaluate.hpp"
#include "mod.hpp"
#include "random_functions.hpp"
#include "support/named_graphs.hpp"

#include FLASHSPARK_ALL_GRADIENTS_FILE

namespace flashspark::emulator {
namespace {

// What a lane of the kernel gives for one score and one key, in natural units.
struct LaneResult {
  float value = 0, by_score = 0;
  std::vector<float> slopes;
  std::vector<float *> places;
};
using Lane = LaneResult (*)(const FunctionArguments &, const CapturedGradient *, const FunctionRow &,
                            const FunctionKey &, float score);

template <class F>
LaneResult lane(const FunctionArguments &a, const CapturedGradient *gradients, const FunctionRow &row,
                const FunctionKey &key, float score) {
  LaneResult result;
  if constexpr (F::Score::kExists) {
    uint32_t words[F::Score::kWords + 1];
    F::Score::row(a, row, 1.0f, words);
    const auto y = F::Score::apply(a, gradients, words, F::Score::key(a, key), score, 1.0f, 1.0f, key);
    result.value = y.value, result.by_score = y.by_score;
    result.slopes.assign(y.slopes, y.slopes + F::Score::kLoads);
    result.places.assign(y.places, y.places + F::Score::kLoads);
  }
  return result;
}

struct Compiled {
  const char *name;
  Lane run;
};
#define FLASHSPARK_EACH(name) {#name, lane<UserFunctions_##name>},
const Compiled kCompiled[] = {FLASHSPARK_ALL_FUNCTIONS(FLASHSPARK_EACH)};
#undef FLASHSPARK_EACH

void compare(const Compiled &compiled, const graph::Graph &written, const graph::Bindings &bindings) {
  const graph::Graph score = graph::simplified_function(written);
  const graph::Derivative derivative = graph::derivative(score);
  const test::Function function(score, true, bindings);
  Params p{};
  p.score_mod = function.get();
  const auto arguments = std::make_unique<FunctionArguments>();
  cuda::add_functions(p, *arguments);
  // Places are compared as numbers: nothing is stored there.
  std::vector<CapturedGradient> gradients(kMaxCapturedTensors);
  std::vector<float> memory(kMaxCapturedTensors);
  for (size_t n = 0; n < gradients.size(); ++n) {
    gradients[n].data = memory.data() + n;
    for (int32_t d = 0; d < kMaxCapturedRank; ++d) gradients[n].strides[d] = 1 + 3 * d;
  }
  const auto near = [](float got, double expected) {
    if (std::isnan(expected)) return std::isnan(got);
    return std::isinf(expected) ? double{got} == expected
                                : std::fabs(double{got} - expected) <= 1e-4 * (1 + std::fabs(expected));
  };
  cases::Random random(7);
  const auto below = [&](int64_t n) { return static_cast<int32_t>(random.below(n)); };
  for (int n = 0; n < 1000; ++n) {
    const graph::Row row{below(4), below(8), below(250), 250, 300, below(20), below(20)};
    const int32_t first = below(130), step = below(2) * 8;
    const FunctionKey key{first + step, static_cast<float>(first), static_cast<float>(step)};
    const float s = static_cast<float>(below(127) - 63) / 4;
    const FunctionRow kernel_row{row.b, row.h, row.q_idx, row.seqlen_q, row.seqlen_k, row.offset_q, row.offset_k};
    const LaneResult got = compiled.run(*arguments, gradients.data(), kernel_row, key, s);
    const auto where = [&](const char *what, double x, double y) {
      return std::string(what) + " of b " + std::to_string(row.b) + ", h " + std::to_string(row.h) + ", q_idx " +
             std::to_string(row.q_idx) + ", kv_idx " + std::to_string(key.idx) + ", score " + std::to_string(s) + ": " +
             std::to_string(x) + " instead of " + std::to_string(y);
    };
    const auto of = [&](const graph::Graph &graph, size_t result) {
      return graph::evaluate(graph, bindings, row, key.idx, double{s}, static_cast<int32_t>(result));
    };
    const double value = of(score, 0).value, by_score = of(derivative.graph, 0).value;
    ASSERT_TRUE(near(got.value, value)) << where("value", double{got.value}, value);
    ASSERT_TRUE(near(got.by_score, by_score)) << where("derivative", double{got.by_score}, by_score);
    ASSERT_EQ(got.slopes.size(), derivative.loads.size());
    for (size_t m = 0; m < derivative.loads.size(); ++m) {
      const double slope = of(derivative.graph, 1 + m).value;
      ASSERT_TRUE(near(got.slopes[m], slope)) << where("slope", double{got.slopes[m]}, slope);
      graph::Graph place = score;
      const auto inputs = score.nodes[static_cast<size_t>(derivative.loads[m].node)].inputs();
      place.results.assign(inputs.begin(), inputs.end());
      const auto tensor = static_cast<size_t>(derivative.loads[m].tensor);
      int64_t at = 0;
      for (size_t d = 0; d < inputs.size(); ++d) {
        const int64_t size = bindings.tensors[tensor].shape[d], index = of(place, d).integer;
        at += std::clamp<int64_t>(index < 0 ? index + size : index, 0, size - 1) * gradients[tensor].strides[d];
      }
      ASSERT_EQ(got.places[m], gradients[tensor].data + at) << where("place", 0, 0);
    }
  }
}

class GradientSource : public testing::TestWithParam<Compiled> {};

TEST_P(GradientSource, GivesTheOraclesValues) {
  const std::string name = GetParam().name;
  if (name.starts_with("random_")) {
    const RandomFunctions random(std::stoull(name.substr(7)));
    return compare(GetParam(), random.score, random.score_graph.bindings());
  }
  const auto score = test::named(name).score();
  if (!score) return;
  const test::Captures captures(*score, 1);
  compare(GetParam(), *score, captures.get());
}
INSTANTIATE_TEST_SUITE_P(All, GradientSource, testing::ValuesIn(kCompiled),
                         [](const auto &compiled) { return std::string(compiled.param.name); });

}  // namespace
}  // namespace flashspark::emulator
