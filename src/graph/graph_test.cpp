// Graphs: what their text may be, the oracle against plain numbers, simplification, and derivatives of known functions.
// Random graphs are in tests/property/graph_property_test.cpp.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "error.hpp"
#include "graph/derivative.hpp"
#include "graph/evaluate.hpp"

namespace flashspark::graph {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const std::string kHeader = "flashspark-graph 1\n";
const std::string kAlibi =
    kHeader + "score\nh\nq_idx\nkv_idx\nload 0 f32 1 1\nsub 3 2\nto_f32 5\nmul 4 6\nadd 0 7\nreturn 8\n";

template <class F>
std::string message(F f) {
  try {
    f();
  } catch (const Error &error) {
    EXPECT_EQ(error.status(), FLASHSPARK_INVALID_ARGUMENT);
    return error.what();
  }
  return "nothing was thrown";
}

Graph body(const std::string &lines) {
  return parse(kHeader + lines);
}

AuxTensor vector_of(const void *data, DataType dtype, size_t count) {
  return {data, static_cast<int32_t>(dtype), 1, {static_cast<int64_t>(count)}, {1}};
}

double value(const Graph &graph, double score = 0, int32_t result = 0) {
  return evaluate(graph, {}, {.b = 0, .h = 1, .q_idx = 2, .seqlen_q = 4, .seqlen_k = 5, .offset_q = 6, .offset_k = 7},
                  3, score, result)
      .value;
}

// ---- the text

TEST(GraphText, ReadsAndWrites) {
  const Graph graph = parse(kAlibi);
  EXPECT_EQ(graph.nodes.size(), 9u);
  EXPECT_EQ(graph.num_tensors, 1);
  EXPECT_EQ(graph.num_scalars, 0);
  EXPECT_EQ(graph.captures[0], (Capture{1, DataType::f32}));
  EXPECT_EQ(graph.nodes[4].depends, kDependsH);
  EXPECT_EQ(graph.nodes[5].depends, kDependsQ | kDependsKv);
  EXPECT_EQ(graph.nodes[8].depends, kDependsScore | kDependsH | kDependsQ | kDependsKv);
  EXPECT_EQ(to_text(graph), kAlibi);
}

TEST(GraphText, KeepsConstants) {
  const std::string text = kHeader +
                           "const f32 0x1.8p+1\nconst f32 -0x0p+0\nconst f32 inf\nconst f32 -inf\nconst f32 nan\n"
                           "const f32 0x1p-149\nconst i64 -9223372036854775808\nconst i32 2147483647\nconst bool 1\n"
                           "scalar 2 i64\nreturn 0 1 8\n";
  const Graph graph = parse(text);
  EXPECT_EQ(to_text(graph), text);
  EXPECT_EQ(graph.nodes[0].real(), 3.0f);
  EXPECT_TRUE(std::signbit(graph.nodes[1].real()));
  EXPECT_EQ(graph.num_scalars, 3);
  EXPECT_EQ(body("const f32 0x1.8000000000000p+1\nreturn 0\n").nodes[0].real(), 3.0f);  // Python writes all digits
}

struct Wrong {
  const char *lines, *message;
};

TEST(GraphText, NamesTheWrongLine) {
  const Wrong wrongs[] = {
      {"scor\nreturn 0\n", "graph line 0 (\"scor\"): \"scor\" is not an operation"},
      {"score\nadd 0 1\nreturn 1\n", "graph line 1 (\"add 0 1\"): operand 1 is not the number of an earlier line"},
      {"score\nneg -1\nreturn 1\n", "graph line 1 (\"neg -1\"): operand -1 is not the number of an earlier line"},
      {"score\nb\nadd 0 1\nreturn 2\n", "add has operands of different types: f32 and i32"},
      {"b\nexp 0\nreturn 1\n", "graph line 1 (\"exp 0\"): exp has no operands of type i32"},
      {"score\nadd 0\nreturn 0\n", "graph line 1 (\"add 0\"): add has 2 operands, not 1"},
      {"score\nneg 0 0\nreturn 0\n", "neg has 1 operands, not 2"},
      {"score\nwhere 0 0 0 0\nreturn 0\n", "condition of where must be bool, not f32"},
      {"b\nlt 0 0\nwhere 1 0 0 0\nreturn 0\n", "graph line 2 (\"where 1 0 0 0\"): more fields than the operation has"},
      {"score \nreturn 0\n", "fields are separated by single spaces"},
      {"score\nadd 0  0\nreturn 0\n", "fields are separated by single spaces"},
      {"\nreturn 0\n", "fields are separated by single spaces"},
      {"score\nreturn 0", "graph line 1 (\"return 0\"): the line does not end with a line feed"},
      {"score\n", "graph line 1: a graph ends with a return line"},
      {"score\nreturn\n", "graph line 1 (\"return\"): the line ends before"},
      {"score\nreturn 1\n", "operand 1 is not the number of an earlier line"},
      {"score\nreturn 0\nscore\n", "graph line 1 (\"score\"): nothing follows the return line"},
      {"const f32 1.5\nreturn 0\n", "\"1.5\" is not a single-precision number in C's hexadecimal form"},
      {"const f32 0x1.000001p+0\nreturn 0\n", "\"0x1.000001p+0\" is not a single-precision number"},
      {"const f32 0xinf\nreturn 0\n", "is not a single-precision number"},
      {"const i32 2147483648\nreturn 0\n", "the constant does not fit i32"},
      {"const bool 2\nreturn 0\n", "a bool constant is 0 or 1"},
      {"const u8 2\nreturn 0\n", "\"u8\" is not a type"},
      {"scalar 64 f32\nreturn 0\n", "a scalar's number must be from 0 to 15"},
      {"scalar 0 bool\nreturn 0\n", "a scalar is f32, i32 or i64"},
      {"scalar 0 f32\nscalar 0 i32\nreturn 0\n", "scalar 0 was f32 before"},
      {"b\nload 16 f32 1 0\nreturn 1\n", "a tensor's number must be from 0 to 15"},
      {"b\nload 0 f32 9 0 0 0 0 0 0 0 0 0\nreturn 1\n", "a rank must be from 0 to 8"},
      {"b\nload 0 f32 2 0\nreturn 1\n", "graph line 1 (\"load 0 f32 2 0\"): the line ends before"},
      {"b\nload 0 f32 1 0 0\nreturn 1\n", "more fields than the operation has"},
      {"b\nload 0 f32 1 0\nload 0 f32 2 0 0\nreturn 1\n", "tensor 0 was f32 of rank 1 before"},
      {"b\nload 0 f32 1 0\nload 0 f16 1 0\nreturn 1\n", "tensor 0 was f32 of rank 1 before"},
      {"score\nload 0 f32 1 0\nreturn 1\n", "an index is i32 or i64, not f32"},
  };
  for (const Wrong &wrong : wrongs) {
    const std::string text = message([&] { body(wrong.lines); });
    EXPECT_NE(text.find(wrong.message), std::string::npos) << wrong.lines << text;
    EXPECT_NE(text.find("graph line "), std::string::npos) << text;
  }
  for (const char *text : {"", "\n", "flashspark-graph 2\nscore\nreturn 0\n", "flashspark-graph 1"})
    EXPECT_NE(message([&] { parse(text); }).find("a graph starts with the line"), std::string::npos) << text;
}

TEST(GraphText, RefusesTooManyNodes) {
  std::string lines;
  for (int32_t n = 0; n < kMaxNodes; ++n) lines += "b\n";
  EXPECT_EQ(body(lines + "return 4095\n").nodes.size(), static_cast<size_t>(kMaxNodes));
  EXPECT_NE(message([&] { body(lines + "b\nreturn 0\n"); }).find("at most 4096 nodes"), std::string::npos);
}

// ---- bindings

TEST(GraphBindings, AreChecked) {
  const Graph graph = body("h\nload 1 f32 1 0\nscalar 1 f32\nadd 1 2\nreturn 3\n");
  const float data[2] = {};
  const double scalars[2] = {};
  const AuxTensor good = vector_of(data, DataType::f32, 2);
  const auto verdict = [&](AuxTensor tensor, size_t num_tensors = 2, size_t num_scalars = 2) {
    const AuxTensor tensors[] = {AuxTensor{}, tensor};  // number 0 is not read
    return message([&] { check(graph, {std::span(tensors, num_tensors), std::span(scalars, num_scalars)}); });
  };
  EXPECT_EQ(verdict(good), "nothing was thrown");
  EXPECT_EQ(verdict(good, 1), "the graph reads 2 captured tensors, given is 1");
  EXPECT_EQ(verdict(good, 2, 0), "the graph reads 2 scalars, given are 0");
  EXPECT_EQ(verdict(vector_of(data, DataType::f16, 2)), "captured tensor 1: the graph reads f32, given is f16");
  EXPECT_EQ(verdict(vector_of(data, DataType::f32, 0)), "captured tensor 1: dimension 0 has size 0: must be positive");
  EXPECT_EQ(verdict(vector_of(nullptr, DataType::f32, 2)), "captured tensor 1 has no data");
  AuxTensor other = good;
  other.rank = 2;
  EXPECT_EQ(verdict(other), "captured tensor 1: the graph reads a tensor of rank 1, given is one of rank 2");
  other.dtype = 77;
  EXPECT_NE(verdict(other).find("an unknown data type (77)"), std::string::npos);
}

// ---- operations

// The value of "OP a b.." for constants, from the oracle.
double of_consts(const std::string &op, const std::vector<std::string> &constants) {
  std::string lines, operands;
  for (size_t n = 0; n < constants.size(); ++n) {
    lines += "const " + constants[n] + "\n";
    operands += " " + std::to_string(n);
  }
  return value(body(lines + op + operands + "\nreturn " + std::to_string(constants.size()) + "\n"));
}

TEST(GraphOracle, DividesAsPythonDoes) {
  const auto divide = [](const char *op, const char *type, const char *a, const char *b) {
    return of_consts(op, {std::string(type) + " " + a, std::string(type) + " " + b});
  };
  for (const char *type : {"i32", "i64"}) {
    EXPECT_EQ(divide("floordiv", type, "7", "-2"), -4);
    EXPECT_EQ(divide("floordiv", type, "-7", "2"), -4);
    EXPECT_EQ(divide("floordiv", type, "-7", "-2"), 3);
    EXPECT_EQ(divide("mod", type, "7", "-2"), -1);
    EXPECT_EQ(divide("mod", type, "-7", "2"), 1);
    EXPECT_EQ(divide("mod", type, "-6", "2"), 0);
    EXPECT_EQ(divide("floordiv", type, "7", "0"), 0);
    EXPECT_EQ(divide("mod", type, "7", "0"), 0);
  }
  EXPECT_EQ(divide("floordiv", "i32", "-2147483648", "-1"), -2147483648.0);
  EXPECT_EQ(divide("mod", "i32", "-2147483648", "-1"), 0);
  EXPECT_EQ(divide("floordiv", "f32", "0x1.cp+2", "-0x1p+1"), -4);
  EXPECT_EQ(divide("mod", "f32", "0x1.cp+2", "-0x1p+1"), -1);
  EXPECT_EQ(divide("floordiv", "f32", "-0x1p+0", "inf"), -1);
  EXPECT_EQ(divide("mod", "f32", "-0x1p+0", "inf"), kInf);
  EXPECT_EQ(divide("floordiv", "f32", "0x1p+0", "0x0p+0"), kInf);
  EXPECT_TRUE(std::isnan(divide("mod", "f32", "0x1p+0", "0x0p+0")));
}

TEST(GraphOracle, WrapsAndSaturates) {
  EXPECT_EQ(of_consts("add", {"i32 2147483647", "i32 1"}), -2147483648.0);
  EXPECT_EQ(of_consts("mul", {"i32 65536", "i32 65536"}), 0);
  EXPECT_EQ(of_consts("neg", {"i32 -2147483648"}), -2147483648.0);
  EXPECT_EQ(of_consts("abs", {"i32 -2147483648"}), -2147483648.0);
  EXPECT_EQ(of_consts("shl", {"i32 3", "i32 33"}), 6);
  EXPECT_EQ(of_consts("shl", {"i64 3", "i64 33"}), 3.0 * (int64_t{1} << 33));
  EXPECT_EQ(of_consts("shr", {"i32 -8", "i32 1"}), -4);
  EXPECT_EQ(of_consts("not", {"bool 1"}), 0);
  EXPECT_EQ(of_consts("not", {"i32 5"}), -6);
  EXPECT_EQ(of_consts("to_i32", {"f32 0x1p+40"}), 2147483647.0);
  EXPECT_EQ(of_consts("to_i32", {"f32 -inf"}), -2147483648.0);
  EXPECT_EQ(of_consts("to_i32", {"f32 nan"}), 0);
  EXPECT_EQ(of_consts("to_i32", {"f32 -0x1.8p+0"}), -1);
  EXPECT_EQ(of_consts("to_i32", {"i64 4294967297"}), 1);
  EXPECT_EQ(of_consts("to_i64", {"f32 inf"}), static_cast<double>(std::numeric_limits<int64_t>::max()));
  EXPECT_EQ(of_consts("to_bool", {"f32 nan"}), 1);
  EXPECT_EQ(of_consts("round", {"f32 0x1.4p+1"}), 2);
}

TEST(GraphOracle, TreatsNanAsTheTextSays) {
  for (const char *op : {"lt", "le", "gt", "ge", "eq"}) EXPECT_EQ(of_consts(op, {"f32 nan", "f32 nan"}), 0) << op;
  EXPECT_EQ(of_consts("ne", {"f32 nan", "f32 nan"}), 1);
  for (const char *op : {"min", "max"}) {
    EXPECT_TRUE(std::isnan(of_consts(op, {"f32 nan", "f32 0x1p+0"})));
    EXPECT_TRUE(std::isnan(of_consts(op, {"f32 0x1p+0", "f32 nan"})));
  }
  EXPECT_TRUE(std::isnan(of_consts("sign", {"f32 nan"})));
}

TEST(GraphOracle, ReadsInputsAndTensors) {
  const Graph graph = body("b\nh\nq_idx\nkv_idx\nseqlen_q\nseqlen_k\noffset_q\noffset_k\nreturn 0 1 2 3 4 5 6 7\n");
  for (int32_t n = 0; n < 8; ++n) EXPECT_EQ(value(graph, 0, n), n);
  const double data[] = {1, 2, 3};
  const AuxTensor tensor = vector_of(data, DataType::f64, 3);
  for (const auto &[index, expected, bad] : {std::tuple{0, 1.0, false},
                                             {2, 3.0, false},
                                             {-1, 3.0, false},
                                             {-3, 1.0, false},
                                             {3, 3.0, true},
                                             {-4, 1.0, true}}) {
    const Graph load = body("const i32 " + std::to_string(index) + "\nload 0 f64 1 0\nreturn 1\n");
    const Evaluation e = evaluate(load, {.tensors = {&tensor, 1}, .scalars = {}}, {}, 0, 0);
    EXPECT_EQ(e.value, expected) << index;
    EXPECT_EQ(e.bad_index.found, bad) << index;
    if (bad) {
      EXPECT_EQ(e.bad_index.index, index);
      EXPECT_EQ(e.bad_index.size, 3);
    }
  }
}

// ---- simplification and derivatives

TEST(GraphSimplify, FoldsMergesAndDrops) {
  const auto simple = [](const std::string &lines) { return to_text(simplified(body(lines))).substr(kHeader.size()); };
  EXPECT_EQ(simple("score\nb\nconst f32 0x1p+0\nmul 0 2\nreturn 3\n"), "score\nreturn 0\n");
  EXPECT_EQ(simple("b\nconst i32 2\nconst i32 -2\nadd 1 2\nadd 0 3\nreturn 4\n"), "b\nreturn 0\n");
  EXPECT_EQ(simple("b\nb\nadd 0 1\nadd 1 0\nsub 2 3\nreturn 4\n"), "b\nadd 0 0\nsub 1 1\nreturn 2\n");
  EXPECT_EQ(simple("b\nscore\nto_bool 0\nwhere 2 1 1\nreturn 3\n"), "score\nreturn 0\n");
  EXPECT_EQ(simple("const f32 0x1p+0\nconst f32 0x1.8p+1\ndiv 0 1\nreturn 2\n"), "const f32 0x1.555556p-2\nreturn 0\n");
  // -0 + 0 is 0, not -0, and NaN * 0 is NaN.
  const std::string sum = "score\nconst f32 0x0p+0\nadd 0 1\nmul 0 1\nreturn 2 3\n";
  EXPECT_EQ(simple(sum), sum);
}

TEST(GraphDerivative, KnownFunctions) {
  struct Case {
    const char *lines;
    double score, slope;
  };
  const Case cases[] = {
      {"score\nreturn 0\n", 3, 1},
      {"b\nto_f32 0\nreturn 1\n", 3, 0},
      {"score\nmul 0 0\nreturn 1\n", 3, 6},
      {"score\nscore\nmul 0 1\nreturn 2\n", 3, 6},
      {"score\ntanh 0\nreturn 1\n", 0, 1},
      {"score\nabs 0\nreturn 1\n", -2, -1},
      {"score\nabs 0\nreturn 1\n", 0, 0},
      {"score\nconst f32 0x1p+0\nmax 0 1\nreturn 2\n", 1, 0.5},
      {"score\nconst f32 0x1p+0\nmin 0 1\nreturn 2\n", 2, 0},
      {"score\nconst f32 0x1p+0\nmax 0 1\nreturn 2\n", 2, 1},
      {"score\nconst f32 0x1p+1\npow 0 1\nreturn 2\n", 3, 6},
      {"score\nconst f32 0x0p+0\npow 0 1\nreturn 2\n", 0, 0},
      {"score\nfloor 0\nreturn 1\n", 0.5, 0},
      {"score\nsign 0\nreturn 1\n", 0.5, 0},
      {"score\nto_i32 0\nto_f32 1\nreturn 2\n", 0.5, 0},
      {"score\nconst f32 0x1.8p+1\nmod 0 1\nreturn 2\n", 4, 1},
      {"score\nconst f32 0x1.8p+1\nfloordiv 0 1\nreturn 2\n", 4, 0},
  };
  for (const Case &c : cases) EXPECT_NEAR(value(derivative(body(c.lines)).graph, c.score), c.slope, 1e-6) << c.lines;
  EXPECT_NE(message([] { derivative(body("b\nreturn 0\n")); }).find("only an f32 result"), std::string::npos);
}

TEST(GraphDerivative, OfLoads) {
  const Derivative d = derivative(parse(kAlibi));
  ASSERT_EQ(d.loads.size(), 1u);
  EXPECT_EQ(d.loads[0].node, 4);
  EXPECT_EQ(d.loads[0].tensor, 0);
  EXPECT_EQ(to_text(d.graph), kHeader + "q_idx\nkv_idx\nsub 1 0\nto_f32 2\nconst f32 0x1p+0\nreturn 4 3\n");
}

}  // namespace
}  // namespace flashspark::graph
