// The user's functions and block lists through the C interface: engine against oracle on random problems, what lists
// say, and every rule of a call with them.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <set>

#include "cases/cases.hpp"
#include "support/functions.hpp"
#include "support/named_graphs.hpp"
#include "support/random_graph.hpp"

namespace flashspark::test {
namespace {

using cases::Case;
using cases::Layout;

constexpr const char *kImplementations[] = {"cpu-engine", "cpu-reference"};

using Draw = cases::Random;

void choose_sizes(Draw &draw, Case &c) {
  c.heads_kv = draw.from(1, 2);
  c.heads_q = c.heads_kv * draw.of<int64_t>({1, 1, 2, 3, 4, 7});
  c.head_dim = 8 * draw.from(1, 9), c.head_dim_v = 8 * draw.from(1, 9);
  c.q_dtype = c.out_dtype = draw.of({FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT32, FLASHSPARK_BFLOAT16});
  c.kv_dtype = draw.one_in(4) ? FLASHSPARK_FLOAT8_E4M3 : c.q_dtype;
  const bool decode = draw.one_in(4);
  c.lens.resize(static_cast<size_t>(draw.from(1, 4)));
  for (cases::SeqLen &len : c.lens) {
    len.q = decode ? 1 : draw.one_in(8) ? 0 : draw.from(1, draw.one_in(2) ? 9 : 70);
    len.k = draw.one_in(10) ? 0 : draw.from(1, draw.one_in(3) ? 290 : 90);
    // Pairs cost time: of the oracle, a microsecond each.
    while (len.q * len.k * c.heads_q > 20000) (len.q > 12 ? len.q : len.k) /= 2;
  }
}

void choose_layout(Draw &draw, Case &c) {
  c.q_layout = draw.of({Layout::kDense, Layout::kVarlen});
  c.kv_layout = draw.of({Layout::kDense, Layout::kVarlen, Layout::kPaged});
  c.page_size = draw.from(1, 50);
  c.strided = draw.one_in(3);
  c.seqused_q = draw.one_in(4), c.seqused_k = draw.one_in(4);
  c.kv_batch_index = c.kv_layout != Layout::kVarlen && draw.one_in(4);
  if (c.kv_layout != Layout::kVarlen && draw.one_in(4)) c.leftpad = draw.from(1, 9);
}

void choose_mask(Draw &draw, Case &c) {
  c.causal = draw.one_in(2), c.causal_per_seq = draw.one_in(8);
  if (draw.one_in(4)) c.window_left = draw.from(0, 60);
  if (draw.one_in(5)) c.window_right = draw.from(0, 30);
  if (draw.one_in(8)) c.attention_chunk = draw.from(5, 60);
  c.sinks = draw.one_in(4);
  if (!c.causal_per_seq && draw.one_in(8)) c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
  c.num_splits = draw.of({0, 0, 1, 2, 5});
  c.lse = !draw.one_in(4);
}

// Scores that are multiples of 1/4 below 16, exact in any arithmetic: functions may compare them with something.
void make_scores_exact(Draw &draw, cases::Problem &problem) {
  const Case &c = problem.spec();
  const auto fill = [&](cases::Role role, int64_t b, int64_t rows, int64_t heads, int64_t most) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < c.head_dim; ++d) {
          const bool zero = d >= most;
          problem.set(role, b, i, h, d, zero ? 0.0f : draw.of({-1.0f, -0.5f, 0.0f, 0.5f, 1.0f}));
        }
      }
    }
  };
  for (size_t b = 0; b < c.lens.size(); ++b) {
    const auto n = static_cast<int64_t>(b);
    fill(cases::Role::kQ, n, problem.seqlen_q(n), c.heads_q, 15);
    fill(cases::Role::kK, n, problem.seqlen_k(n), c.heads_kv, c.head_dim);
  }
  problem.params.softmax_scale = 1;
}

// A problem with random functions and lists, and all that they need.
class RandomProblem {
 public:
  explicit RandomProblem(uint64_t seed) : draw_(seed, 'f'), problem(random_case(seed)) {
    const bool exact = softens_nothing() && draw_.one_in(2);
    if (exact) make_scores_exact(draw_, problem);
    const int64_t kind = draw_.from(0, 9);  // of ten: 4 a score function, 3 a mask, 2 both, 1 only lists
    if (kind < 4 || kind > 7) add_score(seed, exact);
    if (kind > 3 && kind != 7) add_mask(seed);
    if (kind == 7 || draw_.one_in(2)) add_lists(seed);
  }

  std::string check() {
    const cases::Result expected = cases::reference(problem);
    const cases::Result got = problem.run("cpu-engine", static_cast<int>(draw_.from(0, 3)));
    if (got.status != FLASHSPARK_OK) return got.error;
    const cases::Comparison c = cases::compare(problem, got, expected);
    worst_ratio = std::max(worst_ratio, c.ratio);
    if (c.nonfinite_match && c.untouched && c.ratio <= kSlack) return {};
    return "max error " + std::to_string(c.max_error) + ", " + std::to_string(c.ratio) + " of the bound, lse " +
           std::to_string(c.lse_max_error) + (c.untouched ? "" : ", wrote elsewhere") +
           (c.nonfinite_match ? "" : ", infinities differ");
  }

  // A chain of operations rounds more often than the bound of plain attention allows for.
  static constexpr double kSlack = 2;
  static double worst_ratio;

 private:
  Draw draw_;

 public:
  cases::Problem problem;

 private:
  Case random_case(uint64_t seed) {
    Case c;
    c.name = "seed " + std::to_string(seed);
    c.seed = seed;
    choose_sizes(draw_, c);
    choose_layout(draw_, c);
    choose_mask(draw_, c);
    if (draw_.one_in(5)) c.softcap = static_cast<float>(draw_.from(1, 20));
    if (draw_.one_in(6)) c.alibi = true;
    if (draw_.one_in(6)) c.rel_extent = draw_.from(1, 60);
    if (draw_.one_in(6)) c.dropout = 0.3f, c.dropout_seed = seed;
    if (c.kv_dtype == FLASHSPARK_FLOAT8_E4M3 && draw_.one_in(2)) c.k_descale = c.v_descale = cases::Descale::kFull;
    return c;
  }
  bool softens_nothing() const {
    const Case &c = problem.spec();
    return c.softcap == 0 && !c.alibi && c.rel_extent == 0 && c.k_descale == cases::Descale::kNone;
  }
  GraphWish wish(Type result) {
    GraphWish wish;
    wish.result = result, wish.wild_indices = false;
    wish.depth = static_cast<int>(draw_.from(1, 8)), wish.max_magnitude = 8, wish.max_nodes = 60;
    return wish;
  }
  void add_score(uint64_t seed, bool exact) {
    score_graph_ = std::make_unique<RandomGraph>(2 * seed, wish(Type::f32));
    const Graph graph = tamed(score_graph_->graph, exact);
    score_ = std::make_unique<Function>(graph, true, score_graph_->bindings());
    score_->give(problem.params);
  }
  void add_mask(uint64_t seed) {
    mask_graph_ = std::make_unique<RandomGraph>(2 * seed + 1, wish(Type::boolean));
    mask_ = std::make_unique<Function>(mask_graph_->graph, false, mask_graph_->bindings());
    mask_->give(problem.params);
  }
  void add_lists(uint64_t seed) {
    BlockListWish wish;
    wish.size_q = 16 * draw_.from(1, 5), wish.size_k = 16 * draw_.from(1, 5);
    wish.per_batch = draw_.one_in(2), wish.per_head = draw_.one_in(2);
    wish.masked = !draw_.one_in(4), wish.full = !wish.masked || !draw_.one_in(4);
    lists_ = std::make_unique<BlockLists>(problem.params, wish, seed);
    lists_->give(problem.params);
  }

  std::unique_ptr<RandomGraph> score_graph_, mask_graph_;
  std::unique_ptr<Function> score_, mask_;
  std::unique_ptr<BlockLists> lists_;
};
double RandomProblem::worst_ratio = 0;

class FunctionProblems : public testing::TestWithParam<uint64_t> {};

TEST_P(FunctionProblems, EngineAgreesWithTheOracle) {
  constexpr uint64_t kEach = 100;  // of which nine in ten have a graph, some have two
  for (uint64_t seed = GetParam() * kEach; seed < (GetParam() + 1) * kEach; ++seed) {
    RandomProblem random(seed);
    EXPECT_EQ(random.check(), "") << random.problem.spec().name;
  }
  RecordProperty("worst_ratio", std::to_string(RandomProblem::worst_ratio));
}
INSTANTIATE_TEST_SUITE_P(Random, FunctionProblems, testing::Range<uint64_t>(0, 12));

Case plain(std::vector<cases::SeqLen> lens, int64_t heads_q = 4, int64_t heads_kv = 2) {
  Case c;
  c.name = "plain";
  c.lens = std::move(lens);
  c.heads_q = heads_q, c.heads_kv = heads_kv;
  c.head_dim = 32;
  c.q_dtype = c.kv_dtype = c.out_dtype = FLASHSPARK_FLOAT32;
  return c;
}

void expect_agreement(cases::Problem &problem, const std::string &what, double slack = 4) {
  const cases::Result expected = cases::reference(problem), got = problem.run("cpu-engine");
  ASSERT_EQ(got.status, FLASHSPARK_OK) << what << ": " << got.error;
  const cases::Comparison c = cases::compare(problem, got, expected);
  EXPECT_TRUE(c.nonfinite_match && c.untouched && c.ratio <= slack) << what << ": " << c.ratio << " of the bound";
}

TEST(Functions, NamedOnesOnTheEngineAndTheOracle) {
  std::set<std::string> names;
  for (const NamedFunctions &functions : named_functions()) {
    ASSERT_TRUE(names.insert(functions.name).second);
    std::vector<std::unique_ptr<Captures>> captures;
    std::vector<std::unique_ptr<Function>> given;
    for (Case c : {plain({{70, 130}, {3, 65}}), plain({{1, 300}, {1, 20}})}) {
      c.kv_layout = Layout::kPaged;
      cases::Problem problem(c);
      for (const bool is_score : {true, false}) {
        const std::optional<Graph> graph = is_score ? functions.score() : functions.mask();
        if (!graph) continue;
        captures.push_back(std::make_unique<Captures>(*graph, 5));
        given.push_back(std::make_unique<Function>(*graph, is_score, captures.back()->get()));
        given.back()->give(problem.params);
      }
      expect_agreement(problem, functions.name, 10);
    }
  }
  EXPECT_EQ(names.size(), 20u);
}

// score_mod or mask_mod from a body, with captures.
struct Made {
  Made(const NamedFunctions::Body &body, bool is_score, cases::Problem &problem)
      : graph(*NamedFunctions::graph_of(body)), captures(graph, 1), function(graph, is_score, captures.get()) {
    function.give(problem.params);
  }
  Graph graph;
  Captures captures;
  Function function;
};

// A score that is an input alone shows in lse.
TEST(Functions, InputsAreWhatTheyAreCalled) {
  struct Input {
    Op op;
    std::function<int64_t(const cases::Problem &, int64_t b, int64_t i, int64_t h, int64_t j)> value;
  };
  using P = const cases::Problem &;
  const auto offset = [](const int32_t *cu, int64_t b) { return cu != nullptr ? int64_t{cu[b]} : 0; };
  const Input inputs[] = {
      {Op::B, [](P, int64_t b, int64_t, int64_t, int64_t) { return b; }},
      {Op::H, [](P, int64_t, int64_t, int64_t h, int64_t) { return h; }},
      {Op::QIdx, [](P, int64_t, int64_t i, int64_t, int64_t) { return i; }},
      {Op::KvIdx, [](P, int64_t, int64_t, int64_t, int64_t j) { return j; }},
      {Op::SeqlenQ, [](P p, int64_t b, int64_t, int64_t, int64_t) { return p.seqlen_q(b); }},
      {Op::SeqlenK, [](P p, int64_t b, int64_t, int64_t, int64_t) { return p.seqlen_k(b); }},
      {Op::OffsetQ, [&](P p, int64_t b, int64_t, int64_t, int64_t) { return offset(p.params.cu_seqlens_q, b); }},
      {Op::OffsetK, [&](P p, int64_t b, int64_t, int64_t, int64_t) { return offset(p.params.cu_seqlens_k, b); }},
  };
  for (const Layout layout : {Layout::kVarlen, Layout::kDense, Layout::kPaged}) {
    Case c = plain({{7, 30}, {3, 12}, {5, 9}});
    c.q_layout = layout == Layout::kDense ? Layout::kDense : Layout::kVarlen, c.kv_layout = layout;
    c.leftpad = layout == Layout::kVarlen ? 0 : 2;
    c.seqused_q = c.seqused_k = true;
    for (const Input &input : inputs) {
      cases::Problem problem(c);
      const Made made([&](const Inputs &f) { return real(f.input(input.op)); }, true, problem);
      for (const char *name : kImplementations) {
        const cases::Result r = problem.run(name);
        ASSERT_EQ(r.status, FLASHSPARK_OK) << r.error;
        for (size_t row = 0; row < r.lse.size(); ++row) {
          const auto token = static_cast<int64_t>(row) / c.heads_q, h = static_cast<int64_t>(row) % c.heads_q;
          int64_t b = 0;
          while (problem.row_begin(b + 1) <= token) ++b;
          double sum = 0;
          for (int64_t j = 0; j < problem.seqlen_k(b); ++j)
            sum += std::exp(static_cast<double>(input.value(problem, b, token - problem.row_begin(b), h, j)));
          EXPECT_NEAR(r.lse[row], std::log(sum), 1e-4) << name << ", " << graph::name(input.op) << ", row " << row;
        }
      }
    }
  }
}

// ---- what lists say

// The same as lists, as a mask function that reads what they say from a captured tensor.
class StatusMask {
 public:
  StatusMask(const BlockLists &lists, const BlockListWish &wish, bool causal_where_masked) {
    Graph graph;
    const Inputs f{&graph};
    const Expr status = f.load(
        0, DataType::u8,
        {f.b(), f.h(), f.q().of(Op::FloorDiv, double(wish.size_q)), f.kv().of(Op::FloorDiv, double(wish.size_k))});
    Expr keep = status == double(BlockLists::kFull);
    const Expr asked = status == double(BlockLists::kMasked);
    keep = keep | (causal_where_masked ? asked & (f.kv() <= f.pos()) : asked);
    graph.results = {keep.node};
    const int64_t rows = lists.blocks_q() * lists.blocks_k();
    tensor_ = {lists.statuses().data(),
               static_cast<int32_t>(DataType::u8),
               4,
               {64, 64, lists.blocks_q(), lists.blocks_k()},
               {lists.batch() > 1 ? lists.heads() * rows : 0, lists.heads() > 1 ? rows : 0, lists.blocks_k(), 1}};
    function = std::make_unique<Function>(graph, false, graph::Bindings{{&tensor_, 1}, {}});
  }
  std::unique_ptr<Function> function;

 private:
  graph::AuxTensor tensor_;
};

TEST(BlockLists, SayWhatIsComputedWhateverTheMaskSays) {
  for (const bool causal : {false, true}) {  // mask_mod in the blocks that ask it
    for (uint64_t seed = 1; seed <= 6; ++seed) {
      cases::Problem problem(plain({{70, 130}, {33, 65}, {1, 100}}));
      const flashspark_attention_params before = problem.params;
      BlockListWish wish;
      wish.size_q = 16 * static_cast<int64_t>(1 + seed % 3), wish.size_k = 48;
      wish.per_batch = seed % 2 == 0, wish.per_head = seed % 3 == 0;
      const BlockLists lists(problem.params, wish, seed);
      const StatusMask mask(lists, wish, causal);
      mask.function->give(problem.params);
      const cases::Result expected = cases::reference(problem);
      problem.params = before;
      lists.give(problem.params);
      std::optional<Made> causal_mask;
      if (causal) causal_mask.emplace([](const Inputs &f) { return f.kv() <= f.pos(); }, false, problem);
      for (const char *name : kImplementations) {
        const cases::Comparison c = cases::compare(problem, problem.run(name), expected);
        EXPECT_TRUE(c.passed()) << name << ", seed " << seed << ": " << c.ratio << " of the bound";
      }
    }
  }
}

// Of a function without lists that keeps nothing, of empty lists, and of lists that name no block of the row.
TEST(BlockLists, RowsWithoutKeysAreZero) {
  Case c = plain({{40, 90}, {1, 7}});
  const auto expect_empty = [](cases::Problem &problem, int64_t first_token, bool all, const std::string &what) {
    const int64_t heads = problem.spec().heads_q, width = problem.spec().head_dim_v;
    for (const char *name : kImplementations) {
      const cases::Result r = problem.run(name);
      ASSERT_EQ(r.status, FLASHSPARK_OK) << r.error;
      for (size_t row = 0; row < r.lse.size(); ++row) {
        const bool empty = all || static_cast<int64_t>(row) / heads >= first_token;
        EXPECT_EQ(r.lse[row] == -std::numeric_limits<float>::infinity(), empty) << what << ", " << name << ": " << row;
        for (int64_t d = 0; empty && d < width; ++d)
          EXPECT_EQ(r.out[row * static_cast<size_t>(width) + static_cast<size_t>(d)], 0.0f) << what << ", " << name;
      }
    }
  };
  {
    cases::Problem problem(c);
    const Made nothing([](const Inputs &f) { return f.kv() < 0; }, false, problem);
    expect_empty(problem, 0, true, "mask_mod");
  }
  {
    cases::Problem problem(c);
    const Made lowest([](const Inputs &f) { return f.score() - std::numeric_limits<double>::infinity(); }, true,
                      problem);
    expect_empty(problem, 0, true, "score_mod");
  }
  {
    c.lens = {{40, 90}};
    cases::Problem problem(c);
    const Made some([](const Inputs &f) { return f.q() < 17; }, false, problem);
    expect_empty(problem, 17, false, "mask_mod of some rows");
  }
  {
    cases::Problem problem(c);
    BlockListWish wish;
    wish.none = 1, wish.some = wish.all = 0;
    const BlockLists lists(problem.params, wish, 3);
    lists.give(problem.params);
    expect_empty(problem, 0, true, "empty lists");
  }
}

TEST(BlockLists, SinksStayInRowsWithoutKeys) {
  Case c = plain({{5, 20}});
  c.sinks = true;
  cases::Problem problem(c);
  const Made nothing([](const Inputs &f) { return f.kv() < 0; }, false, problem);
  for (const char *name : kImplementations) {
    const cases::Result r = problem.run(name);
    ASSERT_EQ(r.status, FLASHSPARK_OK) << r.error;
    for (size_t row = 0; row < r.lse.size(); ++row)
      EXPECT_FLOAT_EQ(r.lse[row], cases::load(c.sinks_dtype, problem.params.sinks, static_cast<int64_t>(row % 4)));
  }
}

}  // namespace
}  // namespace flashspark::test
