// Gradients through the user's functions and lists, and what NaN and infinity do: engine against oracle.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cases/backward.hpp"
#include "cases/random.hpp"
#include "error.hpp"
#include "support/functions.hpp"
#include "support/named_graphs.hpp"

namespace flashspark::test {
namespace {

using cases::BackwardProblem;
using cases::Case;
using cases::Gradients;

Case plain(std::vector<cases::SeqLen> lens, int32_t dtype = FLASHSPARK_FLOAT32) {
  Case c;
  c.name = "functions";
  c.lens = std::move(lens);
  c.heads_q = 4, c.heads_kv = 2, c.head_dim = 32, c.head_dim_v = 24;
  c.q_dtype = c.kv_dtype = c.out_dtype = dtype;
  return c;
}

// Functions of the problem, with the gradients of those captured tensors that are small.
class Given {
 public:
  Given(BackwardProblem &problem, const NamedFunctions &functions) {
    flashspark_attention_params &f = problem.forward.params;
    for (const bool is_score : {true, false}) {
      const std::optional<Graph> graph = is_score ? functions.score() : functions.mask();
      if (!graph) continue;
      captures_.push_back(std::make_unique<Captures>(*graph, 5));
      given_.push_back(std::make_unique<Function>(*graph, is_score, captures_.back()->get()));
      given_.back()->give(f);
    }
    for (int32_t n = 0; f.score_mod.mod != nullptr && n < f.score_mod.num_tensors; ++n) {
      const flashspark_captured_tensor &t = f.score_mod.tensors[n];
      const bool floating = t.dtype == FLASHSPARK_FLOAT32 || t.dtype == FLASHSPARK_FLOAT16 ||
                            t.dtype == FLASHSPARK_BFLOAT16 || t.dtype == FLASHSPARK_FLOAT64;
      sums.emplace_back(floating && t.rank <= 1 ? Captures::kSize : 0);
      gradients_.push_back({sums.back().empty() ? nullptr : sums.back().data(), {1}});
    }
    if (!gradients_.empty()) problem.params.dtensors = gradients_.data();
    sync(problem);
  }

  // After a change of the forward problem: out and lse, too.
  static void sync(BackwardProblem &problem) {
    EXPECT_EQ(problem.forward.launch("cpu-reference", 0), FLASHSPARK_OK) << flashspark_last_error();
    problem.params.forward = problem.forward.params;
  }

  std::vector<std::vector<float>> sums;  // of the captured tensors

 private:
  std::vector<std::unique_ptr<Captures>> captures_;
  std::vector<std::unique_ptr<Function>> given_;
  std::vector<flashspark_captured_gradient> gradients_;
};

// Derivatives of functions have no bound of their own here; single precision leaves some 1e-6 of a tensor's largest
// element, and what is wrong is wrong in the first digits.
void expect_near(const std::vector<float> &got, const std::vector<float> &expected, const std::string &what,
                 double tolerance) {
  ASSERT_EQ(got.size(), expected.size()) << what;
  double largest = 1e-3;
  for (const float x : expected) largest = std::max(largest, std::fabs(double{x}));
  for (size_t n = 0; n < got.size(); ++n)
    ASSERT_NEAR(got[n], expected[n], tolerance * largest) << what << "[" << n << "], largest " << largest;
}

void expect_agreement(BackwardProblem &problem, std::vector<std::vector<float>> &sums, const std::string &what,
                      double tolerance = 3e-5) {
  const Gradients expected = problem.run("cpu-reference");
  const std::vector<std::vector<float>> expected_sums = sums;
  const Gradients got = problem.run("cpu-engine", 3);
  ASSERT_EQ(expected.status, FLASHSPARK_OK) << expected.error;
  ASSERT_EQ(got.status, FLASHSPARK_OK) << got.error;
  EXPECT_EQ(got.trespass, "");
  expect_near(got.dq, expected.dq, what + " dq", tolerance);
  expect_near(got.dk, expected.dk, what + " dk", tolerance);
  expect_near(got.dv, expected.dv, what + " dv", tolerance);
  expect_near(got.drel, expected.drel, what + " drel_logits", tolerance);
  expect_near(got.dalibi, expected.dalibi, what + " dalibi_slopes", tolerance);
  for (size_t n = 0; n < sums.size(); ++n)
    expect_near(sums[n], expected_sums[n], what + " captured tensor " + std::to_string(n), tolerance);
}

TEST(BackwardFunctions, NamedOnesAgreeWithTheOracle) {
  for (const NamedFunctions &functions : named_functions()) {
    BackwardProblem problem(plain({{130, 210}, {3, 65}}));
    Given given(problem, functions);
    expect_agreement(problem, given.sums, functions.name);
  }
}

TEST(BackwardFunctions, ListsAgreeWithTheOracle) {
  for (const uint64_t seed : {1, 2, 3, 4}) {
    for (const char *name : {"none", "neighbours", "alibi_documents"}) {
      Case c = plain({{200, 300}, {77, 65}});
      c.causal = seed % 2 == 0;
      BackwardProblem problem(c);
      const BlockLists lists(problem.forward.params,
                             {.size_q = seed % 2 == 0 ? 64 : 48, .size_k = 16, .per_head = seed != 3}, seed);
      lists.give(problem.forward.params);
      Given given(problem, named(name));
      expect_agreement(problem, given.sums, std::string(name) + " with lists " + std::to_string(seed));
    }
  }
}

// What is built in, beside functions and lists: rows that see none of a tile's keys may lie between such that do.
TEST(BackwardFunctions, BesideBuiltInBiasesAndMasksAgreeWithTheOracle) {
  const struct {
    const char *name;
    void (*change)(Case &);
  } built_in[] = {
      {"alibi", [](Case &c) { c.alibi = true; }},
      {"alibi by sequence", [](Case &c) { c.causal = c.alibi = c.alibi_per_batch = true; }},
      {"rel_logits", [](Case &c) { c.rel_extent = 40, c.rel_dtype = FLASHSPARK_FLOAT32; }},
      {"prefix", [](Case &c) { c.causal = true, c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ; }},
      {"prefix beside a window",
       [](Case &c) { c.causal = true, c.window_left = 15, c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ; }},
      {"prefix by token",
       [](Case &c) { c.causal = true, c.window_left = 15, c.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN; }},
      {"rswa", [](Case &c) { c.causal = true, c.rswa_window = 20; }},
      {"chunks", [](Case &c) { c.attention_chunk = 70; }},
      {"all",
       [](Case &c) {
         c.causal = c.sinks = c.alibi = true, c.softcap = 3, c.rel_extent = 30, c.rel_dtype = FLASHSPARK_FLOAT32;
         c.attention_chunk = 70, c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
       }},
  };
  for (const auto &each : built_in) {
    for (const char *name : {"temperature", "alibi_documents", "none"}) {
      Case c = plain({{200, 430}, {77, 65}});
      each.change(c);
      BackwardProblem problem(c);
      std::optional<BlockLists> lists;
      if (name != std::string("temperature")) {
        lists.emplace(problem.forward.params, BlockListWish{.size_q = 48, .size_k = 32}, uint64_t{7});
        lists->give(problem.forward.params);
      }
      Given given(problem, named(name));
      expect_agreement(problem, given.sums, std::string(name) + " beside " + each.name);
    }
  }
}

// Some rows see the first keys, those between them do not, nor what an earlier tile has left in their place.
TEST(BackwardFunctions, RowsThatSeeNothingLieBetweenOthers) {
  for (const int32_t dtype : {FLASHSPARK_FLOAT32, FLASHSPARK_BFLOAT16}) {
    Case c = plain({{300, 600}}, dtype);
    c.causal = true, c.window_left = 15, c.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN;
    BackwardProblem problem(c);
    std::vector<int32_t> ranges;
    for (int32_t token = 0; token < 300; ++token) {
      const bool early = token / 20 % 2 == 0, late = token / 30 % 2 == 0;
      ranges.insert(ranges.end(), {early ? 0 : late ? 200 : -1, early ? 150 : late ? 500 : -1});
    }
    problem.forward.params.prefix_ranges = ranges.data();
    Given given(problem, named("alibi"));
    expect_agreement(problem, given.sums, "alibi", dtype == FLASHSPARK_FLOAT32 ? 3e-5 : 0.02);
  }
}

// Deterministic sums of captured tensors, one of rank 2 and read twice, with everything else that scores are made of.
TEST(BackwardFunctions, CapturedTensorsOfAnyRankAreTheSameWithAnyNumberOfThreads) {
  const NamedFunctions functions{"table",
                                 [](const Inputs &f) {
                                   const Expr bucket = least((f.q() - f.kv()).of(Op::Abs), 19);
                                   const Expr x = f.load(0, DataType::f32, {f.h(), bucket});
                                   const Expr y = f.load(0, DataType::f32, {f.h(), f.h().number(-1)});
                                   return f.score() * (x + y).of(Op::Tanh) + f.load(1, DataType::f16, {});
                                 },
                                 {}};
  const Graph graph = *functions.score();
  std::vector<float> table(4 * 20);
  cases::Random random(9);
  for (float &x : table) x = static_cast<float>(random.normal());
  const uint16_t one = float_to_f16(0.75f);
  graph::AuxTensor tensors[] = {{table.data(), static_cast<int32_t>(DataType::f32), 2, {4, 20}, {20, 1}},
                                {&one, static_cast<int32_t>(DataType::f16), 0, {}, {}}};
  const Function function(graph, true, {tensors, {}});
  Case c = plain({{300, 500}, {20, 400}});
  c.causal = c.sinks = c.alibi = true, c.softcap = 3, c.dropout = 0.3f, c.rel_extent = 30;
  BackwardProblem problem(c);
  function.give(problem.forward.params);
  problem.forward.params.deterministic = 1;
  Given::sync(problem);
  std::vector<std::vector<float>> sums = {std::vector<float>(80), std::vector<float>(1)};
  const flashspark_captured_gradient gradients[] = {{sums[0].data(), {1, 4}}, {sums[1].data(), {}}};
  problem.params.dtensors = gradients;
  expect_agreement(problem, sums, "table");
  const std::vector<std::vector<float>> three = sums;
  for (const int threads : {1, 8}) {
    ASSERT_EQ(problem.run("cpu-engine", threads).status, FLASHSPARK_OK);
    EXPECT_EQ(sums, three) << threads;
  }
}

TEST(BackwardFunctions, IndicesOutsideATensorAreNamed) {
  const NamedFunctions functions{
      "far", [](const Inputs &f) { return f.score() + f.load(0, DataType::f32, {f.kv() * 100}); }, {}};
  for (const char *implementation : {"cpu-reference", "cpu-engine"}) {
    BackwardProblem problem(plain({{3, 60}}));
    const std::optional<Graph> graph = functions.score();
    const Captures captures(*graph, 5);
    const Function function(*graph, true, captures.get());
    function.give(problem.params.forward);
    const Gradients g = problem.run(implementation);
    EXPECT_EQ(g.status, FLASHSPARK_INVALID_ARGUMENT);
    EXPECT_EQ(g.error,
              "score_mod: index 4100 of captured tensor 0 is outside dimension 0 of 4096 (b 0, h 0, q_idx 0, kv_idx "
              "41)");
  }
}

// A key, value or query that is not finite must not reach what its mask keeps it from.
TEST(BackwardNan, StaysWhereItBelongs) {
  for (const char *implementation : {"cpu-reference", "cpu-engine"}) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      Case c = plain({{150, 150}});
      c.causal = true;
      BackwardProblem clean(c), problem(c);
      const Gradients want = clean.run(implementation, 1);
      constexpr int64_t kKey = 100, kRow = 60;  // rows from 100 on see the key; keys up to 60 are seen by the row
      problem.forward.set(cases::Role::kK, 0, kKey, 0, 3, bad);
      problem.forward.set(cases::Role::kV, 0, kKey, 0, 3, bad);
      problem.forward.set(cases::Role::kQ, 0, kRow, 1, 3, bad);
      Given::sync(problem);
      const Gradients got = problem.run(implementation, 1);
      ASSERT_EQ(got.status, FLASHSPARK_OK) << got.error;
      const int64_t d = 32, dv = 24;
      // An infinite score of a row that it reaches may also be -inf, and nothing to the row.
      const auto expect = [&](float x, float clean_x, bool reached, const char *name, int64_t row, int64_t h) {
        const std::string where =
            std::string(implementation) + " " + name + " " + std::to_string(row) + ", " + std::to_string(h);
        if (!reached) {
          EXPECT_EQ(x, clean_x) << where;
        }
        if (std::isnan(bad)) {
          EXPECT_EQ(std::isnan(x), reached) << where;
        }
      };
      for (int64_t i = 0; i < 150; ++i) {
        for (int64_t h = 0; h < 4; ++h) {
          const auto at = static_cast<size_t>((i * 4 + h) * d);
          expect(got.dq[at], want.dq[at], (h < 2 && i >= kKey) || (h == 1 && i == kRow), "dq", i, h);
        }
      }
      for (int64_t j = 0; j < 150; ++j) {
        for (int64_t h = 0; h < 2; ++h) {  // the rows of KV head 0 from 100 on are NaN, and one of them sees each key
          const auto at = static_cast<size_t>((j * 2 + h) * d), at_v = static_cast<size_t>((j * 2 + h) * dv);
          expect(got.dk[at], want.dk[at], h == 0, "dk", j, h);
          expect(got.dv[at_v], want.dv[at_v], h == 0, "dv", j, h);
        }
      }
      // Row 60 alone: keys behind it are not its own.
      problem.forward.set(cases::Role::kK, 0, kKey, 0, 3, 0.5f);
      problem.forward.set(cases::Role::kV, 0, kKey, 0, 3, 0.5f);
      clean.forward.set(cases::Role::kK, 0, kKey, 0, 3, 0.5f);
      clean.forward.set(cases::Role::kV, 0, kKey, 0, 3, 0.5f);
      Given::sync(problem);
      Given::sync(clean);
      const Gradients of_row = problem.run(implementation, 1), without = clean.run(implementation, 1);
      for (int64_t j = 0; j < 150; ++j) {
        const auto at = static_cast<size_t>(j * 2 * d), at_v = static_cast<size_t>(j * 2 * dv);
        expect(of_row.dk[at], without.dk[at], j <= kRow, "dk beside a row", j, 0);
        expect(of_row.dv[at_v], without.dv[at_v], j <= kRow, "dv beside a row", j, 0);
      }
    }
  }
}

// What lies before the first and behind the last key that a row keeps may hold anything.
TEST(BackwardNan, KeysOutsideEveryWindowAreNotRead) {
  for (const char *implementation : {"cpu-reference", "cpu-engine"}) {
    Case c = plain({{20, 300}});
    c.window_left = 30, c.window_right = 0;
    BackwardProblem clean(c), problem(c);
    for (int64_t j = 0; j < 250; ++j) {
      for (int64_t h = 0; h < 2; ++h) {
        problem.forward.set(cases::Role::kK, 0, j, h, 5, std::numeric_limits<float>::quiet_NaN());
        problem.forward.set(cases::Role::kV, 0, j, h, 5, std::numeric_limits<float>::quiet_NaN());
      }
    }
    Given::sync(problem);
    const Gradients want = clean.run(implementation, 1), got = problem.run(implementation, 1);
    EXPECT_EQ(got.dq, want.dq) << implementation;
    EXPECT_EQ(got.dk, want.dk) << implementation;
    EXPECT_EQ(got.dv, want.dv) << implementation;
  }
}

}  // namespace
}  // namespace flashspark::test
