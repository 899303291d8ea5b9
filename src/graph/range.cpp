#include "graph/range.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace flashspark::graph {
namespace {

constexpr double kInt32Max = std::numeric_limits<int32_t>::max();

Range widest(Type type) {
  if (type == Type::boolean) return {0, 1};
  const double limit = type == Type::i32 ? kInt32Max + 1 : 0x1p63;
  return {-limit, limit};
}

Range of_load(DataType dtype) {
  switch (dtype) {
    case DataType::boolean:
      return {0, 1};
    case DataType::u8:
      return {0, 255};
    case DataType::i8:
      return {-128, 127};
    case DataType::i16:
      return {-32768, 32767};
    default:
      return widest(type_of(dtype));
  }
}

Range hull(std::initializer_list<double> values) {
  return {std::min(values), std::max(values)};
}

// By a constant above 0; otherwise nothing is known.
Range of_division(Op op, const Range &a, const Range &b, const Range &unknown) {
  if (b.low != b.high || b.low <= 0) return unknown;
  return op == Op::Mod ? Range{0, b.low - 1} : Range{std::floor(a.low / b.low), std::floor(a.high / b.low)};
}

Range of(const Node &node, const std::vector<Range> &known, double max_position) {
  const auto input = [&](int32_t n) { return known[static_cast<size_t>(node.operands[static_cast<size_t>(n)])]; };
  const Range unknown = widest(node.type);
  switch (node.op) {
    case Op::QIdx:
    case Op::KvIdx:
    case Op::SeqlenQ:
    case Op::SeqlenK:
      return {0, max_position};
    case Op::B:
    case Op::H:
    case Op::OffsetQ:
    case Op::OffsetK:
      return {0, kInt32Max};
    case Op::Const:
      return {static_cast<double>(node.value), static_cast<double>(node.value)};
    case Op::Load:
      return of_load(node.dtype);
    case Op::Add:
      return {input(0).low + input(1).low, input(0).high + input(1).high};
    case Op::Sub:
      return {input(0).low - input(1).high, input(0).high - input(1).low};
    case Op::Mul:
      return hull({input(0).low * input(1).low, input(0).low * input(1).high, input(0).high * input(1).low,
                   input(0).high * input(1).high});
    case Op::Neg:
      return {-input(0).high, -input(0).low};
    case Op::Abs:
      return {input(0).low > 0 ? input(0).low : std::max(0.0, -input(0).high), std::max(-input(0).low, input(0).high)};
    case Op::Min:
      return {std::min(input(0).low, input(1).low), std::min(input(0).high, input(1).high)};
    case Op::Max:
      return {std::max(input(0).low, input(1).low), std::max(input(0).high, input(1).high)};
    case Op::FloorDiv:
    case Op::Mod:
      return of_division(node.op, input(0), input(1), unknown);
    case Op::Where:
      return {std::min(input(1).low, input(2).low), std::max(input(1).high, input(2).high)};
    case Op::ToI64:
      return input(0);
    default:
      return unknown;
  }
}

}  // namespace

std::vector<Range> ranges(const Graph &graph, double max_position) {
  std::vector<Range> known;
  for (const Node &node : graph.nodes) {
    const Range unknown = widest(node.type);
    if (node.type == Type::f32) {
      known.push_back({-HUGE_VAL, HUGE_VAL});
      continue;
    }
    // What may wrap may be anything. A float's range says nothing of what it is converted to.
    const Range range = of(node, known, max_position);
    known.push_back(range.low >= unknown.low && range.high <= unknown.high ? range : unknown);
  }
  return known;
}

}  // namespace flashspark::graph
