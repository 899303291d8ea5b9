// Random graphs: the text, the vector code against the oracle, simplification, derivatives.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>

#include "cpu/tile.hpp"
#include "error.hpp"
#include "graph/derivative.hpp"
#include "graph/evaluate.hpp"
#include "graph/vector.hpp"
#include "support/random_graph.hpp"

namespace flashspark::test {
namespace {

using graph::Graph;
using graph::Node;
using graph::Op;
using graph::Type;

uint64_t any_seed() {
  return *rc::gen::noShrink(rc::gen::arbitrary<uint64_t>());
}

GraphWish any_wish() {
  GraphWish wish;
  wish.all_exact = *rc::gen::arbitrary<bool>();
  wish.depth = *rc::gen::inRange(0, 13);
  wish.wild_indices = *rc::gen::arbitrary<bool>();
  return wish;
}

// A tile's scores in any layout: rows or keys side by side, with gaps.
struct Scores {
  Scores(RandomGraph &g, bool keys_first)
      : row_stride(keys_first ? 1 : g.num_keys + g.between(0, 3)),
        key_stride(keys_first ? static_cast<int64_t>(g.rows.size()) + g.between(0, 3) : 1),
        values(g.rows.size() * g.num_keys + 3 * (g.rows.size() + g.num_keys)) {
    for (float &x : values) x = g.quarter();
  }
  float &at(size_t r, int32_t k) { return values[r * row_stride + k * key_stride]; }

  int64_t row_stride, key_stride;
  std::vector<float> values;
};

// The same function with each node that may round off by a few units in the last place.
Graph shaken(const RandomGraph &g, std::mt19937_64 &random) {
  Graph to;
  std::vector<int32_t> moved;
  for (size_t n = 0; n < g.graph.nodes.size(); ++n) {
    Node node = g.graph.nodes[n];
    for (int32_t k = 0; k < node.num_operands; ++k) node.operands[k] = moved[node.operands[k]];
    int32_t at = to.add_copy(node);
    if (node.type == Type::f32 && g.is_inexact(static_cast<int32_t>(n))) {
      const float factor = 1 + static_cast<float>(static_cast<int>(random() % 9) - 4) * 0x1p-23f;
      at = to.add(Op::Mul, {at, to.add_const(factor)});
    }
    moved.push_back(at);
  }
  to.results = {moved[g.graph.results[0]]};
  return to;
}

bool same(double a, double b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

void compare_scores(RandomGraph &g, const graph::Program &program, bool keys_first) {
  Scores given(g, keys_first), got = given;
  const int32_t rows = static_cast<int32_t>(g.rows.size());
  std::vector<uint8_t> flags(g.rows.size() * g.num_keys);
  graph::OutOfRange oor{.flags = flags.data()};
  program.score_tile(g.bindings(), g.rows.data(), rows, g.kv_begin, g.num_keys, got.values.data(), got.row_stride,
                     got.key_stride, &oor);
  std::vector<Graph> variants;
  for (int n = 0; n < 8; ++n) variants.push_back(shaken(g, g.random()));
  const bool exact = !g.is_inexact(g.graph.results[0]);
  bool found = false;
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t k = 0; k < g.num_keys; ++k) {
      if (rows * g.num_keys > 100 && g.between(0, 9) != 0) continue;  // a tenth of a large tile
      const auto value = [&](const Graph &function) {
        return graph::evaluate(function, g.bindings(), g.rows[r], g.kv_begin + k, given.at(r, k));
      };
      const graph::Evaluation expected = value(g.graph);
      RC_ASSERT(flags[r * g.num_keys + k] == expected.bad_index.found);
      const double actual = got.at(r, k);
      if (same(expected.value, actual)) continue;
      RC_ASSERT(!exact);
      double allowed = 1e-6 * std::fabs(expected.value) + 1e-37;
      for (const Graph &variant : variants) allowed += 2 * std::fabs(value(variant).value - expected.value);
      if (!(std::fabs(actual - expected.value) <= allowed)) RC_LOG() << graph::to_text(g.graph) << r << " " << k;
      RC_ASSERT(std::fabs(actual - expected.value) <= allowed);
    }
  }
  for (const uint8_t flag : flags) found = found || flag != 0;
  RC_ASSERT(oor.found == found);
}

RC_GTEST_PROP(Graphs, TheTextGivesTheGraphAgain, ()) {
  GraphWish wish = any_wish();
  wish.result = *rc::gen::element(Type::f32, Type::boolean, Type::i32, Type::i64);
  const RandomGraph g(any_seed(), wish);
  const std::string text = graph::to_text(g.graph);
  RC_ASSERT(graph::parse(text) == g.graph);
  RC_ASSERT(graph::to_text(graph::parse(text)) == text);
}

RC_GTEST_PROP(Graphs, VectorsComputeScoresAsTheOracleDoes, ()) {
  RandomGraph g(any_seed(), any_wish());
  const auto targets = cpu::all_kernels();
  cpu::use_kernels(targets[*rc::gen::inRange<size_t>(0, targets.size())]);
  compare_scores(g, graph::Program(g.graph), *rc::gen::arbitrary<bool>());
  cpu::use_kernels(nullptr);
}

RC_GTEST_PROP(Graphs, VectorsComputeMasksAsTheOracleDoes, ()) {
  GraphWish wish = any_wish();
  wish.all_exact = true;
  wish.result = *rc::gen::element(Type::boolean, Type::i32, Type::i64);
  RandomGraph g(any_seed(), wish);
  // An integer is seen bit by bit.
  const int32_t root = g.graph.results[0];
  if (wish.result != Type::boolean) {
    const int32_t bit = g.graph.add_const(wish.result, int64_t{1} << g.between(0, wish.result == Type::i32 ? 30 : 62));
    const int32_t both = g.graph.add(Op::And, {root, bit});
    g.graph.results = {g.graph.add(Op::ToBool, {both})};
  }
  const graph::Program program(g.graph);
  std::vector<uint8_t> keep(g.rows.size() * g.num_keys, 7), flags(keep.size());
  graph::OutOfRange oor{.flags = flags.data()};
  program.mask_tile(g.bindings(), g.rows.data(), static_cast<int32_t>(g.rows.size()), g.kv_begin, g.num_keys,
                    keep.data(), &oor);
  for (size_t r = 0; r < g.rows.size(); ++r) {
    for (int32_t k = 0; k < g.num_keys; ++k) {
      const graph::Evaluation expected = graph::evaluate(g.graph, g.bindings(), g.rows[r], g.kv_begin + k, 0);
      RC_ASSERT(keep[r * g.num_keys + k] == expected.value);
      RC_ASSERT(flags[r * g.num_keys + k] == expected.bad_index.found);
    }
  }
}

RC_GTEST_PROP(Graphs, SimplifiedGraphsComputeTheSame, ()) {
  RandomGraph g(any_seed(), any_wish());
  const Graph simple = graph::simplified(g.graph);
  RC_ASSERT(simple.nodes.size() <= g.graph.nodes.size());
  RC_ASSERT(graph::simplified(simple) == simple);
  RC_ASSERT(graph::parse(graph::to_text(simple)) == simple);
  std::vector<Graph> variants;
  for (int n = 0; n < 8; ++n) variants.push_back(shaken(g, g.random()));
  for (int n = 0; n < 30; ++n) {
    const graph::Row &row = g.rows[g.between(0, static_cast<int64_t>(g.rows.size()) - 1)];
    const int32_t key = static_cast<int32_t>(g.between(0, 250));
    const float score = g.quarter();
    const auto value = [&](const Graph &function) {
      return graph::evaluate(function, g.bindings(), row, key, score).value;
    };
    const double expected = value(g.graph), actual = value(simple);
    if (same(expected, actual)) continue;
    RC_ASSERT(g.is_inexact(g.graph.results[0]));
    double allowed = 1e-6 * std::fabs(expected) + 1e-37;
    for (const Graph &variant : variants) allowed += 2 * std::fabs(value(variant) - expected);
    RC_ASSERT(std::fabs(actual - expected) <= allowed);
  }
}

// A slope by differences, or NaN near a step or a bend.
template <class F>
double slope(F f) {
  constexpr double kStep = 1e-5;
  const double middle = f(0), up = (f(kStep) - middle) / kStep, down = (middle - f(-kStep)) / kStep;
  const double nearer = (f(kStep / 2) - middle) / (kStep / 2);
  const double allowed = 1e-3 * (1 + std::fabs(up) + std::fabs(down));
  const bool steady = std::fabs(up - down) <= allowed && std::fabs(up - nearer) <= allowed;
  return steady ? (up + down) / 2 : std::numeric_limits<double>::quiet_NaN();
}

// The element that a load reads.
int64_t place(RandomGraph &g, const Node &node, const graph::Row &row, int32_t key, double score) {
  Graph indices = g.graph;
  indices.results.assign(node.inputs().begin(), node.inputs().end());
  const graph::AuxTensor &tensor = g.tensor(node.number);
  int64_t at = 0;
  for (int32_t n = 0; n < node.num_operands; ++n) {
    const int64_t index = graph::evaluate(indices, g.bindings(), row, key, score, n).integer, size = tensor.shape[n];
    at += std::clamp<int64_t>(index < 0 ? index + size : index, 0, size - 1) * tensor.strides[n];
  }
  return at;
}

// Whether a minimum or maximum has equal operands. The derivative then belongs to both by halves, and two such nodes,
// one on the other, may hide the bend from the differences: max(min(x, 1), 1) is flat on both sides of 1.
bool has_tie(const RandomGraph &g, const graph::Row &row, int32_t key, double score) {
  Graph operands = g.graph;
  operands.results.clear();
  for (const Node &node : g.graph.nodes) {
    if (node.op == Op::Max || node.op == Op::Min)
      operands.results.insert(operands.results.end(), {node.operands[0], node.operands[1]});
  }
  const auto value = [&](size_t n) {
    return graph::evaluate(operands, g.bindings(), row, key, score, static_cast<int32_t>(n)).value;
  };
  for (size_t n = 0; n < operands.results.size(); n += 2) {
    if (value(n) == value(n + 1)) return true;
  }
  return false;
}

void check_slope(double expected, double actual, const RandomGraph &g) {
  if (!std::isfinite(expected) || std::fabs(expected) > 1e5) return;
  const bool close = std::fabs(actual - expected) <= 2e-3 * (1 + std::fabs(expected));
  if (!close) RC_LOG() << graph::to_text(g.graph) << "expected " << expected << " got " << actual << "\n";
  RC_ASSERT(close);
}

RC_GTEST_PROP(Graphs, DerivativesAreSlopes, ()) {
  GraphWish wish{.all_f64 = true, .wild_indices = false, .max_magnitude = 9, .depth = *rc::gen::inRange(0, 10)};
  RandomGraph g(any_seed(), wish);
  const graph::Derivative d = graph::derivative(g.graph);
  RC_ASSERT(d.graph.results.size() == 1 + d.loads.size());
  for (int n = 0; n < 4; ++n) {
    const graph::Row &row = g.rows[g.between(0, static_cast<int64_t>(g.rows.size()) - 1)];
    const int32_t key = static_cast<int32_t>(g.between(0, 250));
    const double score = g.quarter() + 0.0625;
    if (has_tie(g, row, key, score)) continue;
    const auto gradient = [&](int32_t result) {
      return graph::evaluate(d.graph, g.bindings(), row, key, score, result).value;
    };
    const auto function = [&](double x) { return graph::evaluate(g.graph, g.bindings(), row, key, x).value; };
    check_slope(slope([&](double step) { return function(score + step); }), gradient(0), g);
    for (const graph::LoadGradient &load : d.loads) {
      // All loads that read this element together.
      const int64_t at = place(g, g.graph.nodes[load.node], row, key, score);
      double sum = 0;
      for (size_t k = 0; k < d.loads.size(); ++k) {
        const Node &other = g.graph.nodes[d.loads[k].node];
        if (d.loads[k].tensor == load.tensor && place(g, other, row, key, score) == at)
          sum += gradient(static_cast<int32_t>(k) + 1);
      }
      double &element = reinterpret_cast<double *>(g.data(load.tensor))[at];
      const double before = element;
      const double expected = slope([&](double step) {
        element = before + step;
        return function(score);
      });
      element = before;
      check_slope(expected, sum, g);
    }
  }
}

// Any text either is a graph or is refused with a message.
void survives(const std::string &text) {
  try {
    const Graph g = graph::parse(text);
    RC_ASSERT(graph::parse(graph::to_text(g)) == g);
    graph::simplified(g);
    if (g.nodes[g.results[0]].type == Type::f32) graph::derivative(g);
  } catch (const Error &error) {
    RC_ASSERT(error.status() == FLASHSPARK_INVALID_ARGUMENT);
    RC_ASSERT(std::string(error.what()).find("line") != std::string::npos ||
              std::string(error.what()).find("nodes") != std::string::npos);
  }
}

RC_GTEST_PROP(Graphs, GarbageIsRefused, (const std::string &garbage)) {
  survives(garbage);
  survives("flashspark-graph 1\n" + garbage);
  survives("flashspark-graph 1\nscore\n" + garbage + "\nreturn 0\n");
}

RC_GTEST_PROP(Graphs, DamagedTextsAreRefusedOrGraphs, ()) {
  GraphWish wish = any_wish();
  wish.depth = 4;
  RandomGraph g(any_seed(), wish);
  std::string text = graph::to_text(g.graph);
  for (int n = 0; n < 20; ++n) {
    std::string damaged = text;
    const auto at = [&] { return static_cast<size_t>(g.between(0, static_cast<int64_t>(text.size()) - 1)); };
    for (int64_t k = g.between(1, 3); k > 0; --k) {
      if (g.between(0, 1) == 0) {
        damaged[at() % damaged.size()] = "0123456789 \n-.xabf"[g.between(0, 17)];
      } else {
        damaged.erase(at() % damaged.size(), static_cast<size_t>(g.between(1, 4)));
      }
      if (damaged.empty()) break;
    }
    survives(damaged);
  }
}

}  // namespace
}  // namespace flashspark::test
