// A user's score or mask function as a list of typed operations (docs/design/score-graph.md): its text, its rules, and
// what can be computed beforehand.
#pragma once

#include <array>
#include <bit>
#include <compare>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flashspark::graph {

constexpr int32_t kMaxNodes = 4096;
constexpr int32_t kMaxTensors = 16;
constexpr int32_t kMaxScalars = 16;
constexpr int32_t kMaxRank = 8;

enum class Op : uint8_t {
#define FLASHSPARK_GRAPH_OP(identifier, name, operands, types, result) identifier,
#include "graph/ops.def"
};
constexpr int32_t kNumOps = static_cast<int32_t>(Op::Load) + 1;
const char *name(Op op);

enum class Type : uint8_t { boolean, i32, i64, f32 };
constexpr int32_t kNumTypes = 4;
const char *name(Type type);

// What a captured tensor stores.
enum class DataType : uint8_t { boolean, u8, i8, i16, i32, i64, f16, bf16, f32, f64 };
constexpr int32_t kNumDataTypes = 10;
const char *name(DataType dtype);
int32_t size_of(DataType dtype);
// The type of a load from such a tensor.
Type type_of(DataType dtype);
inline bool is_floating(DataType dtype) {
  return type_of(dtype) == Type::f32;
}

// What a node's value depends on: a set, as bits. seqlen_* and offset_* change with b.
constexpr uint8_t kDependsScore = 1, kDependsB = 2, kDependsH = 4, kDependsQ = 8, kDependsKv = 16;

struct Node {
  Op op = Op::Const;
  Type type = Type::i32;
  DataType dtype = DataType::f32;  // of load
  uint8_t depends = 0;
  int32_t num_operands = 0;  // of load: its rank
  int32_t number = 0;        // of load: which tensor; of scalar: which scalar
  int64_t value = 0;         // of const: the number; for f32 its bits
  std::array<int32_t, kMaxRank> operands = {};

  std::span<const int32_t> inputs() const { return {operands.data(), static_cast<size_t>(num_operands)}; }
  float real() const { return std::bit_cast<float>(static_cast<uint32_t>(value)); }
  auto operator<=>(const Node &) const = default;
};

// How a graph reads captured tensor N.
struct Capture {
  int32_t rank = -1;  // -1: no node reads it
  DataType dtype = DataType::f32;
  bool operator==(const Capture &) const = default;
};

struct Graph {
  std::vector<Node> nodes;
  std::vector<int32_t> results;
  int32_t num_tensors = 0;  // the highest number that a load names, plus 1
  int32_t num_scalars = 0;
  std::array<Capture, kMaxTensors> captures = {};

  bool operator==(const Graph &) const = default;

  // These append a node and return its number. They throw when a rule of the table is broken.
  int32_t add(Op op, std::span<const int32_t> operands);
  int32_t add(Op op, std::initializer_list<int32_t> operands) {
    return add(op, std::span(operands.begin(), operands.size()));
  }
  int32_t add_const(Type type, int64_t value);  // bool: 0 or 1; f32: its bits
  int32_t add_const(float value);
  int32_t add_scalar(int32_t number, Type type);
  int32_t add_load(int32_t tensor, DataType dtype, std::span<const int32_t> indices);
  // A copy of a node whose operands are numbers of this graph.
  int32_t add_copy(const Node &node);

 private:
  int32_t append(const Node &node);
  std::array<int8_t, kMaxScalars> scalar_types_ = {};  // 1 + Type; 0: no node reads it
};

// Throws naming the line and what is wrong with it.
Graph parse(std::string_view text);
// parse() of it gives the graph again.
std::string to_text(const Graph &graph);
// A finite number in C's hexadecimal notation: 0x1.8p+1. printf's %a has the locale's decimal point, and zeros on
// Windows.
std::string hex_text(float value);

// Which nodes the results need.
std::vector<bool> needed(const Graph &graph, std::span<const int32_t> results);

// The same results from fewer nodes: constants folded, equal nodes merged, unused ones dropped. Nothing changes a
// result but the rounding of folded constants (once, to f32). Captured tensors and scalars keep their numbers.
Graph simplified(const Graph &graph);
// The same of a function that calls give captures to: all of them count, also those that are no longer read.
Graph simplified_function(const Graph &graph);

}  // namespace flashspark::graph
