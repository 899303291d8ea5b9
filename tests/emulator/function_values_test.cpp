// The CUDA source of functions, compiled for the host, against the oracle: all named functions, and random graphs.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "attention/function_mod.cuh"
#include "cases/random.hpp"
#include "graph/evaluate.hpp"
#include "random_functions.hpp"
#include "support/named_graphs.hpp"

#include FLASHSPARK_ALL_FUNCTIONS_FILE

namespace flashspark::emulator {
namespace {

// What a lane of the kernel gives for one score and one key, in natural units, and whether the row keeps the key.
struct LaneResult {
  float score;
  bool keep;
};
using Lane = LaneResult (*)(const FunctionArguments &, const FunctionRow &, const FunctionKey &, float score,
                            float scale);

template <class F>
LaneResult lane(const FunctionArguments &a, const FunctionRow &row, const FunctionKey &key, float score, float scale) {
  LaneResult result{score, true};
  const float inverse_scale = 1.0f / scale;
  if constexpr (F::Score::kExists) {
    uint32_t words[F::Score::kWords + 1];
    F::Score::row(a, row, inverse_scale, words);
    const auto at = F::Score::key(a, key);
    float scaled = F::Score::apply(a, words, at, score * inverse_scale, scale, inverse_scale, key);
    if constexpr (F::Score::kIsBias) scaled += score * inverse_scale;
    if constexpr (F::Score::kHasOffset) scaled += F::Score::offset(a, words, inverse_scale, key.first);
    result.score = scaled * scale;
  }
  if constexpr (F::Mask::kExists) {
    uint32_t words[F::Mask::kWords + 1];
    F::Mask::row(a, row, inverse_scale, words);
    result.keep = F::Mask::keep(a, words, F::Mask::key(a, key), key);
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

// As src/cuda/function_plan.cpp does it.
void give(const graph::Graph &graph, const graph::Bindings &bindings, int32_t &tensors, int32_t &scalars,
          FunctionArguments &a) {
  for (int32_t n = 0; n < graph.num_tensors; ++n) {
    const graph::AuxTensor &from = bindings.tensors[static_cast<size_t>(n)];
    CapturedTensor &to = a.tensors[tensors++];
    to.data = from.data;
    for (int32_t d = 0; d < from.rank; ++d)
      to.strides[d] = from.strides[d], to.shape[d] = static_cast<int32_t>(from.shape[d]);
  }
  for (const graph::Node &node : graph.nodes) {
    if (node.op != graph::Op::Scalar) continue;
    const double value = bindings.scalars[static_cast<size_t>(node.number)];
    CapturedScalar &to = a.scalars[scalars + node.number];
    if (node.type == graph::Type::f32) {
      to.real = value;
    } else {
      to.integer = static_cast<int64_t>(value);
    }
  }
  scalars += graph.num_scalars;
}

struct Given {
  const graph::Graph *graph = nullptr;  // NULL: there is none
  graph::Bindings bindings;
};

void compare(const Compiled &compiled, const Given &score, const Given &mask) {
  const auto arguments = std::make_unique<FunctionArguments>();
  int32_t tensors = 0, scalars = 0;
  for (const Given *given : {&score, &mask}) {
    if (given->graph != nullptr) give(*given->graph, given->bindings, tensors, scalars, *arguments);
  }
  cases::Random random(7);
  const auto below = [&](int64_t n) { return static_cast<int32_t>(random.below(n)); };
  for (int n = 0; n < 1000; ++n) {
    const graph::Row row{below(4), below(8), below(250), 250, 300, below(20), below(20)};
    const int32_t column = 2 * below(130), step = below(8) * 8 + below(2);
    const FunctionKey key{column + step, static_cast<float>(column), static_cast<float>(step)};
    const float s = static_cast<float>(below(127) - 63) / 4, scale = n % 2 == 0 ? 0.125f : 1.0f;
    const FunctionRow kernel_row{row.b, row.h, row.q_idx, row.seqlen_q, row.seqlen_k, row.offset_q, row.offset_k};
    const LaneResult got = compiled.run(*arguments, kernel_row, key, s, scale);
    const auto where = [&] {
      return std::string(compiled.name) + " of b " + std::to_string(row.b) + ", h " + std::to_string(row.h) +
             ", q_idx " + std::to_string(row.q_idx) + ", kv_idx " + std::to_string(key.idx) + ", score " +
             std::to_string(s);
    };
    if (score.graph != nullptr) {
      const double expected = evaluate(*score.graph, score.bindings, row, key.idx, s).value;
      ASSERT_LE(std::fabs(got.score - expected), 2e-5 * (1 + std::fabs(expected)))
          << where() << ": " << got.score << " instead of " << expected;
    }
    if (mask.graph != nullptr) {
      ASSERT_EQ(got.keep, evaluate(*mask.graph, mask.bindings, row, key.idx, 0).value != 0) << where();
    }
  }
}

class FunctionSource : public testing::TestWithParam<Compiled> {};

TEST_P(FunctionSource, GivesTheOraclesValues) {
  const std::string name = GetParam().name;
  if (name.starts_with("random_")) {
    const RandomFunctions random(std::stoull(name.substr(7)));
    return compare(GetParam(), {&random.score, random.score_graph.bindings()},
                   {&random.mask, random.mask_graph.bindings()});
  }
  const test::NamedFunctions functions = test::named(name);
  const auto score = functions.score(), mask = functions.mask();
  const test::Captures of_score(score ? *score : graph::Graph{}, 1), of_mask(mask ? *mask : graph::Graph{}, 2);
  compare(GetParam(), {score ? &*score : nullptr, of_score.get()}, {mask ? &*mask : nullptr, of_mask.get()});
}
INSTANTIATE_TEST_SUITE_P(All, FunctionSource, testing::ValuesIn(kCompiled),
                         [](const auto &compiled) { return std::string(compiled.param.name); });

TEST(FunctionSources, OfAllFunctionsAreCompiled) {
  EXPECT_EQ(std::size(kCompiled), test::named_functions().size() + kRandomFunctions);
}

}  // namespace
}  // namespace flashspark::emulator
