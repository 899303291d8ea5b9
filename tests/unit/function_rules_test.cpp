// The rules of functions and block lists: what each error names, indices outside captured tensors, and how long a
// function lives.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "cases/cases.hpp"
#include "support/functions.hpp"
#include "support/named_graphs.hpp"

namespace flashspark::test {
namespace {

constexpr const char *kImplementations[] = {"cpu-engine", "cpu-reference"};

cases::Case plain() {
  cases::Case c;
  c.name = "plain";
  c.lens = {{40, 70}, {3, 30}};
  c.heads_q = 4, c.heads_kv = 2;
  c.head_dim = 16;
  c.q_dtype = c.kv_dtype = c.out_dtype = FLASHSPARK_FLOAT32;
  return c;
}

Graph graph_of(const NamedFunctions::Body &body) {
  return *NamedFunctions::graph_of(body);
}

std::string error_of(const flashspark_attention_params &p) {
  const flashspark_status status = flashspark_attention_validate(&p);
  EXPECT_EQ(flashspark_attention_forward(&p), status);
  if (status == FLASHSPARK_OK) return "accepted";
  return (status == FLASHSPARK_INVALID_ARGUMENT ? "" : std::string(flashspark_status_name(status)) + ": ") +
         flashspark_last_error();
}

// ---- making functions

std::string creation_error(const char *text, bool is_score) {
  flashspark_mod *mod = nullptr;
  const auto status = (is_score ? flashspark_score_mod_create : flashspark_mask_mod_create)(text, &mod);
  EXPECT_EQ(mod, nullptr);
  return status == FLASHSPARK_INVALID_ARGUMENT ? flashspark_last_error() : flashspark_status_name(status);
}

TEST(FunctionRules, TextsThatAreNoFunctions) {
  const std::string head = "flashspark-graph 1\n";
  const auto text = [&](const std::string &lines) { return head + lines; };
  EXPECT_EQ(creation_error(nullptr, true), "text = NULL: must be a function in C or the text of a graph");
  EXPECT_NE(creation_error("", true), "FLASHSPARK_OK");
  EXPECT_NE(creation_error(text("score\nadd 0 1\nreturn 1\n").c_str(), true).find("line"), std::string::npos);
  EXPECT_EQ(creation_error(text("score\nreturn 0 0\n").c_str(), true),
            "text = 2: must return one node, whose type is f32, as a score function's is");
  EXPECT_EQ(creation_error(text("kv_idx\nreturn 0\n").c_str(), true),
            "text = i32: is the type of the result, which must be f32, as a score function's is");
  EXPECT_EQ(creation_error(text("kv_idx\nto_f32 0\nreturn 1\n").c_str(), false),
            "text = f32: is the type of the result, which must be bool, as a mask function's is");
  EXPECT_EQ(creation_error(text("score\nto_bool 0\nreturn 1\n").c_str(), false),
            "text = score: is no input of a mask function");
  const std::string good = text("score\nreturn 0\n");
  EXPECT_EQ(flashspark_score_mod_create(good.c_str(), nullptr), FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(flashspark_last_error()), "mod = NULL: must point to the result");
}

// ---- calls

class FunctionCalls : public testing::Test {
 protected:
  FunctionCalls()
      : score_graph(graph_of([](const Inputs &f) {
          return f.score() + f.load(0, DataType::f32, {f.h(), f.kv()}) * f.scalar(0, Type::f32);
        })),
        mask_graph(graph_of([](const Inputs &f) { return f.kv() <= f.q(); })),
        captures(score_graph, 1),
        score(score_graph, true, captures.get()),
        mask(mask_graph, false, {}),
        problem(plain()) {
    score.give(problem.params);
    mask.give(problem.params);
  }
  flashspark_attention_params params() const { return problem.params; }

  Graph score_graph, mask_graph;
  Captures captures;
  Function score, mask;
  cases::Problem problem;
};

TEST_F(FunctionCalls, WhatTheGraphReadsMustBeGiven) {
  EXPECT_EQ(error_of(params()), "accepted");
  const auto with = [&](auto &&change) {
    flashspark_attention_params p = params();
    flashspark_captured_tensor tensor = p.score_mod.tensors[0];
    p.score_mod.tensors = &tensor;
    change(p.score_mod, tensor);
    return error_of(p);
  };
  using F = flashspark_function &;
  using T = flashspark_captured_tensor &;
  EXPECT_EQ(with([](F f, T) { f.num_tensors = 17; }), "score_mod.num_tensors = 17: must be from 0 to 16");
  EXPECT_EQ(with([](F f, T) { f.num_tensors = -1; }), "score_mod.num_tensors = -1: must be from 0 to 16");
  EXPECT_EQ(with([](F f, T) { f.num_scalars = 17; }), "score_mod.num_scalars = 17: must be from 0 to 16");
  EXPECT_EQ(with([](F f, T) { f.num_scalars = -1; }), "score_mod.num_scalars = -1: must be from 0 to 16");
  EXPECT_EQ(with([](F f, T) { f.tensors = nullptr; }), "score_mod.tensors = NULL: must point to them");
  EXPECT_EQ(with([](F f, T) { f.scalars = nullptr; }), "score_mod.scalars = NULL: must point to them");
  EXPECT_EQ(with([](F f, T) { f.num_tensors = 0; }), "score_mod: the graph reads 1 captured tensors, given are 0");
  EXPECT_EQ(with([](F f, T) { f.num_scalars = 0; }), "score_mod: the graph reads 1 scalars, given are 0");
  EXPECT_EQ(with([](F, T t) { t.dtype = FLASHSPARK_FLOAT16; }),
            "score_mod: captured tensor 0: the graph reads f32, given is f16");
  EXPECT_EQ(with([](F, T t) { t.dtype = FLASHSPARK_FLOAT8_E4M3; }),
            "score_mod: dtype = 4: is no type of a captured tensor");
  EXPECT_EQ(with([](F, T t) { t.dtype = 99; }), "score_mod: dtype = 99: is no type of a captured tensor");
  EXPECT_EQ(with([](F, T t) { t.rank = 1; }),
            "score_mod: captured tensor 0: the graph reads a tensor of rank 2, given is one of rank 1");
  EXPECT_EQ(with([](F, T t) { t.rank = 9; }), "score_mod: tensor rank = 9: must be from 0 to 8");
  EXPECT_EQ(with([](F, T t) { t.rank = -1; }), "score_mod: tensor rank = -1: must be from 0 to 8");
  EXPECT_EQ(with([](F, T t) { t.shape[1] = 0; }),
            "score_mod: captured tensor 0: dimension 1 has size 0: must be positive");
  EXPECT_EQ(with([](F, T t) { t.data = nullptr; }), "score_mod: captured tensor 0 has no data");
  // The other one's number of captures is as good as any.
  EXPECT_EQ(with([](F f, T) { f.mod = nullptr, f.tensors = nullptr, f.num_tensors = 99; }), "accepted");
}

// flashspark.h: each in 1 .. 2^31 - 1.
TEST_F(FunctionCalls, SizesOfCapturedTensorsFitAnInt) {
  flashspark_attention_params p = params();
  flashspark_captured_tensor tensor = p.score_mod.tensors[0];
  p.score_mod.tensors = &tensor;
  tensor.shape[0] = int64_t{1} << 31;
  EXPECT_NE(error_of(p).find("score_mod: captured tensor 0: dimension 0 has size 2147483648"), std::string::npos)
      << error_of(p);
}

TEST_F(FunctionCalls, EachHasItsPlace) {
  flashspark_attention_params p = params();
  std::swap(p.score_mod, p.mask_mod);
  EXPECT_EQ(error_of(p), "score_mod.mod = a mask function: must be made by flashspark_score_mod_create()");
  p.score_mod = {};
  EXPECT_EQ(error_of(p), "mask_mod.mod = a score function: must be made by flashspark_mask_mod_create()");
}

TEST_F(FunctionCalls, BlockListsAreChecked) {
  BlockListWish wish;
  wish.size_q = 16, wish.size_k = 32, wish.none = 0;
  const BlockLists lists(problem.params, wish, 2);
  lists.give(problem.params);
  EXPECT_EQ(error_of(params()), "accepted");
  const auto with = [&](auto &&change) {
    flashspark_attention_params p = params();
    change(p);
    return error_of(p);
  };
  using P = flashspark_attention_params &;
  for (const int64_t size : {int64_t{0}, int64_t{8}, int64_t{-16}, int64_t{24}, int64_t{1} << 31}) {
    const std::string rule = " = " + std::to_string(size) + ": must be a multiple of 16, above 0";
    EXPECT_EQ(with([&](P p) { p.block_size_q = size; }), "block_size_q" + rule);
    EXPECT_EQ(with([&](P p) { p.block_size_k = size; }), "block_size_k" + rule);
  }
  EXPECT_EQ(with([](P p) { p.block_batch = 3; }), "block_batch = 3: must be 1 or num_seqs, 2");
  EXPECT_EQ(with([](P p) { p.block_batch = 0; }), "block_batch = 0: must be 1 or num_seqs, 2");
  EXPECT_EQ(with([](P p) { p.block_heads = 2; }), "block_heads = 2: must be 1 or num_heads_q, 4");
  EXPECT_EQ(with([](P p) { p.num_blocks_q = 2; }), "num_blocks_q = 2: must be from 3 to 2147483647");
  EXPECT_EQ(with([](P p) { p.masked_blocks.width = -1; }), "masked_blocks.width = -1: must be from 0 to 2147483647");
  EXPECT_EQ(with([](P p) { p.full_blocks.indices = nullptr; }),
            "full_blocks.indices = NULL: must be given with counts");
  EXPECT_EQ(with([](P p) { p.masked_blocks = {}, p.full_blocks = {}, p.block_size_q = 7; }), "accepted");

  const auto spoiled = [&](auto &&spoil) {
    flashspark_attention_params p = params();
    p.block_batch = p.block_heads = 1;
    std::vector<int32_t> counts(static_cast<size_t>(p.num_blocks_q), 1), indices(counts.size() * 2, 0);
    p.full_blocks = {counts.data(), indices.data(), 0, 0, 1, 0, 0, 2, 2};
    p.masked_blocks = {};
    spoil(p, counts, indices);
    return error_of(p);
  };
  using V = std::vector<int32_t> &;
  EXPECT_EQ(spoiled([](P, V, V) {}), "accepted");
  EXPECT_EQ(spoiled([](P, V counts, V) { counts[2] = 3; }),
            "full_blocks.counts[0, 0, 2] = 3: must be from 0 to the width, 2");
  EXPECT_EQ(spoiled([](P, V counts, V) { counts[0] = -1; }),
            "full_blocks.counts[0, 0, 0] = -1: must be from 0 to the width, 2");
  EXPECT_EQ(spoiled([](P, V, V indices) { indices[2] = 3; }),
            "full_blocks.indices[0, 0, 1, 0] = 3: must name a key block, 0 to 2");
  EXPECT_EQ(spoiled([](P, V, V indices) { indices[4] = -1; }),
            "full_blocks.indices[0, 0, 2, 0] = -1: must name a key block, 0 to 2");
  EXPECT_EQ(spoiled([](P, V, V indices) { indices[5] = -1; }), "accepted");  // behind the count
  EXPECT_EQ(spoiled([](P p, V counts, V) {
              counts[0] = counts[1] = counts[2] = 0, p.full_blocks.indices = nullptr, p.full_blocks.width = 0;
            }),
            "accepted");
}

// ---- indices outside captured tensors

class CapturedIndices : public testing::Test {
 protected:
  // Runs `body` as a score or mask function with one captured tensor of f32; gives the error, or "".
  std::string run(const NamedFunctions::Body &body, bool is_score, std::vector<int64_t> shape, const char *name,
                  const NamedFunctions::Body &mask_body = {}) {
    graph::AuxTensor tensor{
        zeros_.data(), static_cast<int32_t>(DataType::f32), static_cast<int32_t>(shape.size()), {}, {}};
    std::copy(shape.begin(), shape.end(), tensor.shape);
    const graph::Bindings bindings{{&tensor, 1}, {}};
    const Function function(graph_of(body), is_score, bindings);
    cases::Problem problem(spec);
    function.give(problem.params);
    std::optional<Function> mask;
    if (mask_body) mask.emplace(graph_of(mask_body), false, graph::Bindings{});
    if (mask) mask->give(problem.params);
    if (lists) lists->give(problem.params);
    problem.poison();
    const flashspark_status status = problem.launch(name, 2);
    last = problem.result();
    if (status == FLASHSPARK_OK) return "";
    EXPECT_EQ(status, FLASHSPARK_INVALID_ARGUMENT);
    return flashspark_last_error();
  }

  cases::Case spec = plain();
  cases::Result last;
  std::unique_ptr<BlockLists> lists;

 private:
  std::vector<float> zeros_ = std::vector<float>(1);  // strides are 0
};

NamedFunctions::Body bias(int64_t shift) {
  return
      [shift](const Inputs &f) { return f.score() + f.load(0, DataType::f32, {f.kv() + static_cast<double>(shift)}); };
}

TEST_F(CapturedIndices, TheErrorNamesTensorDimensionAndPlace) {
  spec.lens = {{1, 1}, {1, 30}};
  for (const char *name : kImplementations) {
    EXPECT_EQ(run(bias(0), true, {30}, name), "") << name;
    EXPECT_EQ(run(bias(-30), true, {30}, name), "") << name;  // counts from the end
    const std::string text = run(bias(0), true, {29}, name);
    EXPECT_EQ(text.find("score_mod: index 29 of captured tensor 0 is outside dimension 0 of 29 (b 1, h "), 0u) << text;
    EXPECT_NE(text.find("q_idx 0, kv_idx 29)"), text.npos) << text;
    EXPECT_NE(run(bias(-31), true, {30}, name).find("index -31 of captured tensor 0"), std::string::npos) << name;
    const auto second = [](const Inputs &f) {
      return f.score() + f.load(0, DataType::f32, {f.b(), f.h().of(Op::ToI64) * (1ll << 40)});
    };
    EXPECT_NE(
        run(second, true, {2, 7}, name).find("index 1099511627776 of captured tensor 0 is outside dimension 1 of 7"),
        std::string::npos)
        << name;
    const auto mask = [](const Inputs &f) { return f.load(0, DataType::f32, {f.kv()}) == 0; };
    const std::string of_mask = run(mask, false, {29}, name);
    EXPECT_EQ(of_mask.find("mask_mod: index 29 of captured tensor 0 is outside dimension 0 of 29 (b 1, h "), 0u)
        << of_mask;
    // `where` reads both of its values.
    const auto untaken = [](const Inputs &f) {
      return where(f.kv() < 29, f.score(), f.score()) +
             where(f.kv() < 29, f.load(0, DataType::f32, {f.kv()}), f.score() * 0);
    };
    EXPECT_NE(run(untaken, true, {29}, name), "") << name;
  }
}

TEST_F(CapturedIndices, CountForKeptKeysOnly) {
  spec.lens = {{20, 30}, {1, 30}};
  for (const char *name : kImplementations) {
    const auto before_29 = [](const Inputs &f) { return f.kv() < 29; };
    EXPECT_NE(run(bias(0), true, {29}, name), "") << name;
    EXPECT_EQ(run(bias(0), true, {29}, name, before_29), "") << name;
    EXPECT_NE(run(bias(0), true, {28}, name, before_29), "") << name;
    // A mask drops the key, and mask_mod is asked for others only.
    const auto of_mask = [](const Inputs &f) { return f.load(0, DataType::f32, {f.kv()}) == 0; };
    spec.window_right = -1, spec.window_left = -1, spec.causal = true;
    spec.lens = {{20, 30}};
    EXPECT_NE(run(bias(0), true, {29}, name), "") << name;  // the last row keeps the last key
    spec.window_right = 0, spec.window_left = 3;
    const auto back = [](const Inputs &f) { return f.score() + f.load(0, DataType::f32, {f.pos() - f.kv()}); };
    EXPECT_EQ(run(back, true, {4}, name), "") << name;
    EXPECT_NE(run(back, true, {3}, name), "") << name;
    const auto back_mask = [](const Inputs &f) { return f.load(0, DataType::f32, {f.pos() - f.kv()}) == 0; };
    EXPECT_EQ(run(back_mask, false, {4}, name), "") << name;
    EXPECT_NE(run(back_mask, false, {3}, name), "") << name;
    spec.causal = false, spec.window_left = spec.window_right = -1;
    spec.lens = {{20, 30}, {1, 30}};
    EXPECT_NE(run(of_mask, false, {29}, name), "") << name;
  }
}

TEST_F(CapturedIndices, CountInListedBlocksOnly) {
  spec.lens = {{20, 40}};
  const cases::Problem problem(spec);
  BlockListWish wish;
  wish.size_q = 32, wish.size_k = 32, wish.per_batch = wish.per_head = false;
  // A seed for each state of the second block.
  bool seen[3] = {};
  const auto of_mask = [](const Inputs &f) { return f.load(0, DataType::f32, {f.kv()}) == 0; };
  for (uint64_t seed = 2; seed < 40; seed += 2) {
    lists = std::make_unique<BlockLists>(problem.params, wish, seed);
    const BlockLists::Status second = lists->statuses()[1];
    seen[second] = true;
    for (const char *name : kImplementations) {
      EXPECT_EQ(run(bias(0), true, {32}, name).empty(), second == BlockLists::kNone) << name << " " << second;
      // mask_mod is not asked in a full block.
      EXPECT_EQ(run(of_mask, false, {32}, name).empty(), second != BlockLists::kMasked) << name << " " << second;
    }
  }
  EXPECT_TRUE(seen[0] && seen[1] && seen[2]);
}

// The nearest element is read, and everything is computed, before the call fails.
TEST_F(CapturedIndices, EverythingIsComputedBeforeTheCallFails) {
  for (const char *name : kImplementations) {
    EXPECT_EQ(run(bias(0), true, {70}, name), "");
    const cases::Result expected = last;
    EXPECT_NE(run(bias(0), true, {1}, name), "");
    EXPECT_EQ(last.out, expected.out) << name;
    EXPECT_EQ(last.lse, expected.lse) << name;
  }
}

// ---- lifetime

TEST(FunctionLifetime, ReferencesAreCounted) {
  flashspark_mod_release(nullptr);
  const Graph graph = graph_of([](const Inputs &f) { return f.score() + 1; });
  flashspark_mod *mod = make_mod(graph, true), *same = make_mod(graph, true);
  EXPECT_NE(mod, same);
  flashspark_mod_retain(mod);
  flashspark_mod_release(mod);
  flashspark_mod_release(same);
  cases::Problem problem(plain());
  problem.params.score_mod.mod = mod;
  const cases::Result first = problem.run("cpu-engine");
  EXPECT_EQ(first.status, FLASHSPARK_OK) << first.error;
  flashspark_mod_release(mod);
  problem.params.score_mod = {};
  const cases::Result without = problem.run("cpu-engine");  // softmax does not see a constant, lse does
  for (size_t n = 0; n < without.lse.size(); ++n) EXPECT_NEAR(first.lse[n], without.lse[n] + 1, 1e-5);
}

TEST(FunctionLifetime, ThreadsShareAFunction) {
  flashspark_mod *mod = make_mod(graph_of([](const Inputs &f) { return f.score() * 0.5; }), true);
  cases::Problem expected_of(plain());
  expected_of.params.score_mod.mod = mod;
  const cases::Result expected = expected_of.run("cpu-engine", 1);
  std::vector<std::thread> threads;
  for (int n = 0; n < 4; ++n) {
    flashspark_mod_retain(mod);
    threads.emplace_back([mod, &expected] {
      for (int round = 0; round < 20; ++round) {
        cases::Problem problem(plain());
        problem.params.score_mod.mod = mod;
        EXPECT_EQ(problem.run("cpu-engine", 1).out, expected.out);
      }
      flashspark_mod_release(mod);
    });
  }
  flashspark_mod_release(mod);
  for (std::thread &thread : threads) thread.join();
}

}  // namespace
}  // namespace flashspark::test
