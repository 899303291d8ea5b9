// The vector code of every SIMD target against the oracle, operation by operation, and the flags of wrong indices.
#include "graph/vector.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cpu/tile.hpp"
#include "error.hpp"
#include "graph/evaluate.hpp"

namespace flashspark::graph {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

Graph body(const std::string &lines) {
  return parse("flashspark-graph 1\n" + lines);
}

AuxTensor vector_of(const void *data, DataType dtype, size_t count) {
  return {data, static_cast<int32_t>(dtype), 1, {static_cast<int64_t>(count)}, {1}};
}

// For every target that this CPU runs.
class GraphVectors : public testing::TestWithParam<const cpu::Kernels *> {
 protected:
  void SetUp() override { cpu::use_kernels(GetParam()); }
  void TearDown() override { cpu::use_kernels(nullptr); }
};

std::vector<float> float_samples() {
  std::vector<float> all = {0.0f,  -0.0f,   1,        -1,     0.5f,          1.5f,           2.5f,        -2.5f,
                            1e-3f, kInf,    -kInf,    kNan,   1e-40f,        -1e-40f,        3e38f,       -3e38f,
                            88.5f, 89.5f,   -87.5f,   -104,   2147483648.0f, -2147483648.0f, 16777217.0f, 4e4f,
                            1e9f,  9.3e18f, -9.3e18f, 127.7f, -149.3f,       1.0000001f,     0.9999999f};
  for (int n = 1; n < 200; ++n) all.push_back(std::ldexp(1 + 0.37f * (n % 7), n / 4 - 25) * (n % 2 ? 1.0f : -1.0f));
  return all;
}

void expect_close(double expected, float actual, const std::string &what) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(actual)) << what << " is " << actual;
    return;
  }
  const float rounded = static_cast<float>(expected);
  if (rounded == actual) return;
  const double unit = std::fabs(std::nextafter(std::fabs(rounded), kInf) - std::fabs(rounded));
  EXPECT_LE(std::fabs(actual - expected), std::max(4 * unit, 0x1p-126)) << what << " is " << actual;
}

// Runs `lines`, which read samples a and b as tensors 0 and 1 at kv_idx, for all pairs or for all of a.
template <class T>
void compare_samples(const std::string &op, DataType dtype, const std::vector<T> &samples, bool pairs) {
  std::vector<T> a, b;
  for (const T x : samples) {
    for (const T y : pairs ? samples : std::vector<T>{x}) {
      a.push_back(x);
      b.push_back(y);
    }
  }
  const std::string type = name(dtype);
  std::string lines = "kv_idx\nload 0 " + type + " 1 0\nload 1 " + type + " 1 0\n" + op + (pairs ? " 1 2\n" : " 1\n");
  Graph graph = body(lines + "return 3\n");
  // Results of other types are seen 16 bits at a time.
  std::vector<Graph> views = {graph};
  if (const Type result = graph.nodes[3].type; result != Type::f32) {
    views.clear();
    for (int shift = 0; shift < (result == Type::i64 ? 64 : result == Type::i32 ? 32 : 1); shift += 16) {
      Graph view = graph;
      int32_t at = 3;
      if (result != Type::boolean) {
        at = view.add(Op::Shr, {at, view.add_const(result, shift)});
        at = view.add(Op::And, {at, view.add_const(result, 0xffff)});
      }
      view.results = {view.add(Op::ToF32, {at})};
      views.push_back(view);
    }
  }
  const AuxTensor tensors[] = {vector_of(a.data(), dtype, a.size()), vector_of(b.data(), dtype, b.size())};
  for (const Graph &view : views) {
    std::vector<float> scores(a.size());
    const Row row{};
    const Bindings bindings{tensors, {}};
    Program(view).score_tile(bindings, &row, 1, 0, static_cast<int32_t>(a.size()), scores.data(), 0, 1, nullptr);
    for (size_t n = 0; n < a.size(); ++n) {
      const double expected = evaluate(view, bindings, row, static_cast<int32_t>(n), 0).value;
      std::string what = op;
      what.append(" ").append(type).append(" of ").append(std::to_string(a[n]));
      if (pairs) what.append(" and ").append(std::to_string(b[n]));
      expect_close(expected, scores[n], what);
    }
  }
}

TEST_P(GraphVectors, ComputeFloatOperations) {
  for (const char *op :
       {"neg",   "abs",  "sign",  "exp",   "exp2",  "expm1", "log",     "log2",   "log1p",  "sqrt",    "rsqrt",
        "sin",   "cos",  "tan",   "asin",  "acos",  "atan",  "sinh",    "cosh",   "tanh",   "sigmoid", "erf",
        "floor", "ceil", "round", "trunc", "isnan", "isinf", "to_bool", "to_i32", "to_i64", "to_f32"}) {
    compare_samples(op, DataType::f32, float_samples(), false);
  }
  for (const char *op : {"add", "sub", "mul", "div", "min", "max", "floordiv", "mod", "pow", "atan2", "lt", "le", "gt",
                         "ge", "eq", "ne"}) {
    compare_samples(op, DataType::f32, float_samples(), true);
  }
}

TEST_P(GraphVectors, ComputeIntegerOperations) {
  const std::vector<int32_t> narrow = {0, 1, -1, 2, 3, -3, 7, 31, 33, 65536, 1000003, -1000003, INT32_MAX, INT32_MIN};
  std::vector<int64_t> wide(narrow.begin(), narrow.end());
  for (const int64_t more : {int64_t{63}, int64_t{65}, int64_t{1} << 33, INT64_MAX, INT64_MIN, int64_t{-5000000000}})
    wide.push_back(more);
  for (const char *op : {"add", "sub", "mul", "min", "max", "floordiv", "mod", "and", "or", "xor", "shl", "shr", "lt",
                         "le", "gt", "ge", "eq", "ne"}) {
    compare_samples(op, DataType::i32, narrow, true);
    compare_samples(op, DataType::i64, wide, true);
  }
  for (const char *op : {"neg", "abs", "sign", "not", "to_bool", "to_i32", "to_i64", "to_f32"}) {
    compare_samples(op, DataType::i32, narrow, false);
    compare_samples(op, DataType::i64, wide, false);
  }
  const std::vector<uint8_t> bools = {0, 1, 1, 0, 2};
  for (const char *op : {"and", "or", "xor", "eq", "ne"}) compare_samples(op, DataType::boolean, bools, true);
  for (const char *op : {"not", "to_bool", "to_i32", "to_i64", "to_f32"})
    compare_samples(op, DataType::boolean, bools, false);
}

// One row's or key's wrong index flags its whole row or column.
TEST_P(GraphVectors, FlagWrongIndices) {
  const float data[] = {1, 2, 3, 4};
  const AuxTensor tensor = vector_of(data, DataType::f32, 4);
  const Row rows[] = {{.b = 0, .h = 0, .q_idx = 2, .seqlen_q = 9, .seqlen_k = 9, .offset_q = 0, .offset_k = 0},
                      {.b = 0, .h = 0, .q_idx = 4, .seqlen_q = 9, .seqlen_k = 9, .offset_q = 0, .offset_k = 0}};
  const auto flags_of = [&](const std::string &index) {
    const Program program(body(index + "\nload 0 f32 1 0\nreturn 1\n"));
    float scores[6];
    std::vector<uint8_t> flags(6);
    OutOfRange oor{.flags = flags.data()};
    program.score_tile({.tensors = {&tensor, 1}, .scalars = {}}, rows, 2, 2, 3, scores, 3, 1, &oor);
    EXPECT_TRUE(oor.found);
    EXPECT_EQ(oor.size, 4);
    EXPECT_EQ(oor.index, index == "const i64 -5" ? -5 : 4);
    return flags;
  };
  EXPECT_EQ(flags_of("q_idx"), (std::vector<uint8_t>{0, 0, 0, 1, 1, 1}));
  EXPECT_EQ(flags_of("kv_idx"), (std::vector<uint8_t>{0, 0, 1, 0, 0, 1}));
  EXPECT_EQ(flags_of("const i64 -5"), (std::vector<uint8_t>{1, 1, 1, 1, 1, 1}));
}

INSTANTIATE_TEST_SUITE_P(Targets, GraphVectors, testing::ValuesIn(cpu::all_kernels().begin(), cpu::all_kernels().end()),
                         [](const auto &target) {
                           std::string text = target.param->target;
                           std::erase(text, '-');
                           return text;
                         });

TEST(GraphProgram, RefusesTheWrongResult) {
  const Program program(body("b\nreturn 0\n"));
  const Row row{};
  float score = 0;
  uint8_t keep = 0;
  EXPECT_THROW(program.score_tile({}, &row, 1, 0, 1, &score, 1, 1, nullptr), Error);
  EXPECT_THROW(program.mask_tile({}, &row, 1, 0, 1, &keep, nullptr), Error);
}

// Rows or keys side by side, with gaps that stay as they are, and more rows and keys than a block has.
TEST(GraphProgram, WritesAnyLayout) {
  constexpr int32_t kRows = 37, kKeys = 130;
  const Program program(body("score\nq_idx\nkv_idx\nsub 2 1\nto_f32 3\nadd 0 4\nreturn 5\n"));
  std::vector<Row> rows(kRows);
  for (int32_t r = 0; r < kRows; ++r) rows[r].q_idx = r;
  for (const bool keys_first : {false, true}) {
    const int64_t row_stride = keys_first ? 1 : kKeys + 2, key_stride = keys_first ? kRows + 2 : 1;
    std::vector<float> scores((kRows + 2) * (kKeys + 2), 1000.0f);
    program.score_tile({}, rows.data(), kRows, 5, kKeys, scores.data(), row_stride, key_stride, nullptr);
    std::vector<float> expected(scores.size(), 1000.0f);
    for (int32_t r = 0; r < kRows; ++r) {
      for (int32_t k = 0; k < kKeys; ++k)
        expected[r * row_stride + k * key_stride] = 1000.0f + static_cast<float>(5 + k - r);
    }
    EXPECT_EQ(scores, expected);
  }
}

}  // namespace
}  // namespace flashspark::graph
