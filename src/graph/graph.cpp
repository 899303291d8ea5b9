#include "graph/graph.hpp"

#include <algorithm>
#include <limits>

#include "error.hpp"

namespace flashspark::graph {
namespace {

constexpr uint8_t bit(Type type) {
  return static_cast<uint8_t>(1 << static_cast<int>(type));
}
constexpr uint8_t kNone = 0, kFloat = bit(Type::f32), kWhole = bit(Type::i32) | bit(Type::i64),
                  kBits = bit(Type::boolean) | kWhole, kNumber = kWhole | kFloat, kAny = kBits | kFloat;

enum class ResultRule : uint8_t { kBool, kI32, kI64, kF32, kSame };  // the first four in Type's order
using enum ResultRule;

struct OpRule {
  const char *name;
  int32_t operands;
  uint8_t types;
  ResultRule result;
};

constexpr OpRule kRules[] = {
#define FLASHSPARK_GRAPH_OP(identifier, name, operands, types, result) {name, operands, types, result},
#include "graph/ops.def"
};

constexpr const char *kTypeNames[] = {"bool", "i32", "i64", "f32"};

struct DataTypeRule {
  const char *name;
  int32_t size;
  Type type;
};
constexpr DataTypeRule kDataTypes[] = {{"bool", 1, Type::boolean}, {"u8", 1, Type::i32},   {"i8", 1, Type::i32},
                                       {"i16", 2, Type::i32},      {"i32", 4, Type::i32},  {"i64", 8, Type::i64},
                                       {"f16", 2, Type::f32},      {"bf16", 2, Type::f32}, {"f32", 4, Type::f32},
                                       {"f64", 8, Type::f32}};

const OpRule &rule(Op op) {
  return kRules[static_cast<int>(op)];
}

[[noreturn]] void refuse(const std::string &what) {
  throw Error(FLASHSPARK_INVALID_ARGUMENT, what);
}

uint8_t own_dependence(Op op) {
  switch (op) {
    case Op::Score:
      return kDependsScore;
    case Op::H:
      return kDependsH;
    case Op::QIdx:
      return kDependsQ;
    case Op::KvIdx:
      return kDependsKv;
    case Op::B:
    case Op::SeqlenQ:
    case Op::SeqlenK:
    case Op::OffsetQ:
    case Op::OffsetK:
      return kDependsB;
    default:
      return 0;
  }
}

}  // namespace

const char *name(Op op) {
  return rule(op).name;
}
const char *name(Type type) {
  return kTypeNames[static_cast<int>(type)];
}
const char *name(DataType dtype) {
  return kDataTypes[static_cast<int>(dtype)].name;
}
int32_t size_of(DataType dtype) {
  return kDataTypes[static_cast<int>(dtype)].size;
}
Type type_of(DataType dtype) {
  return kDataTypes[static_cast<int>(dtype)].type;
}

int32_t Graph::append(const Node &node) {
  if (nodes.size() >= static_cast<size_t>(kMaxNodes))
    refuse("a graph has at most " + std::to_string(kMaxNodes) + " nodes");
  nodes.push_back(node);
  Node &added = nodes.back();
  added.depends = own_dependence(node.op);
  for (const int32_t operand : node.inputs()) added.depends |= nodes[operand].depends;
  return static_cast<int32_t>(nodes.size()) - 1;
}

int32_t Graph::add(Op op, std::span<const int32_t> operands) {
  const OpRule &r = rule(op);
  if (op >= Op::Const) refuse(std::string(r.name) + " has fields of its own");
  if (operands.size() != static_cast<size_t>(r.operands)) {
    refuse(std::string(r.name) + " has " + std::to_string(r.operands) + " operands, not " +
           std::to_string(operands.size()));
  }
  Node node{.op = op, .num_operands = r.operands};
  for (size_t n = 0; n < operands.size(); ++n) {
    if (operands[n] < 0 || static_cast<size_t>(operands[n]) >= nodes.size())
      refuse("operand " + std::to_string(operands[n]) + " is not the number of an earlier line");
    node.operands[n] = operands[n];
  }
  Type common = Type::i32;
  for (size_t n = op == Op::Where ? 1 : 0; n < operands.size(); ++n) {
    const Type type = nodes[operands[n]].type;
    if ((r.types & bit(type)) == 0) refuse(std::string(r.name) + " has no operands of type " + name(type));
    if (n + 1 < operands.size() && type != nodes[operands[n + 1]].type) {
      refuse(std::string(r.name) + " has operands of different types: " + name(type) + " and " +
             name(nodes[operands[n + 1]].type));
    }
    common = type;
  }
  if (op == Op::Where && nodes[operands[0]].type != Type::boolean)
    refuse(std::string("the condition of where must be bool, not ") + name(nodes[operands[0]].type));
  node.type = r.result == kSame ? common : static_cast<Type>(r.result);
  return append(node);
}

int32_t Graph::add_const(Type type, int64_t value) {
  if (type == Type::boolean && value != 0 && value != 1) refuse("a bool constant is 0 or 1");
  if (type == Type::i32 && value != static_cast<int32_t>(value)) refuse("the constant does not fit i32");
  if (type == Type::f32) value = static_cast<uint32_t>(value);
  return append({.op = Op::Const, .type = type, .value = value});
}

int32_t Graph::add_const(float value) {
  if (value != value) value = std::numeric_limits<float>::quiet_NaN();
  return add_const(Type::f32, std::bit_cast<uint32_t>(value));
}

int32_t Graph::add_scalar(int32_t number, Type type) {
  if (number < 0 || number >= kMaxScalars)
    refuse("a scalar's number must be from 0 to " + std::to_string(kMaxScalars - 1));
  if (type == Type::boolean) refuse("a scalar is f32, i32 or i64");
  int8_t &known = scalar_types_[number];
  const int8_t given = static_cast<int8_t>(1 + static_cast<int>(type));
  if (known != 0 && known != given)
    refuse("scalar " + std::to_string(number) + " was " + name(static_cast<Type>(known - 1)) + " before");
  const int32_t id = append({.op = Op::Scalar, .type = type, .number = number});
  known = given;
  num_scalars = std::max(num_scalars, number + 1);
  return id;
}

int32_t Graph::add_load(int32_t tensor, DataType dtype, std::span<const int32_t> indices) {
  if (tensor < 0 || tensor >= kMaxTensors)
    refuse("a tensor's number must be from 0 to " + std::to_string(kMaxTensors - 1));
  if (indices.size() > static_cast<size_t>(kMaxRank)) refuse("a tensor has at most 8 dimensions");
  const Capture given{static_cast<int32_t>(indices.size()), dtype};
  Capture &known = captures[tensor];
  if (known.rank >= 0 && known != given) {
    refuse("tensor " + std::to_string(tensor) + " was " + name(known.dtype) + " of rank " + std::to_string(known.rank) +
           " before");
  }
  Node node{.op = Op::Load, .type = type_of(dtype), .dtype = dtype, .num_operands = given.rank, .number = tensor};
  for (size_t n = 0; n < indices.size(); ++n) {
    const int32_t index = indices[n];
    if (index < 0 || static_cast<size_t>(index) >= nodes.size())
      refuse("operand " + std::to_string(index) + " is not the number of an earlier line");
    if ((bit(nodes[index].type) & kWhole) == 0)
      refuse(std::string("an index is i32 or i64, not ") + name(nodes[index].type));
    node.operands[n] = index;
  }
  const int32_t id = append(node);
  known = given;
  num_tensors = std::max(num_tensors, tensor + 1);
  return id;
}

int32_t Graph::add_copy(const Node &node) {
  switch (node.op) {
    case Op::Const:
      return add_const(node.type, node.value);
    case Op::Scalar:
      return add_scalar(node.number, node.type);
    case Op::Load:
      return add_load(node.number, node.dtype, node.inputs());
    default:
      return add(node.op, node.inputs());
  }
}

std::vector<bool> needed(const Graph &graph, std::span<const int32_t> results) {
  std::vector<bool> is_needed(graph.nodes.size());
  for (const int32_t result : results) is_needed[result] = true;
  for (size_t n = graph.nodes.size(); n-- > 0;) {
    if (!is_needed[n]) continue;
    for (const int32_t operand : graph.nodes[n].inputs()) is_needed[operand] = true;
  }
  return is_needed;
}

}  // namespace flashspark::graph
