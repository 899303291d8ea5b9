#include <limits>
#include <map>

#include "graph/evaluate.hpp"
#include "graph/graph.hpp"

namespace flashspark::graph {
namespace {

bool is_const(const Node &node) {
  return node.op == Op::Const;
}

// A number as a constant of this type; false for constants of any other value and for other nodes.
bool is_number(const Node &node, int32_t number) {
  if (!is_const(node) || node.type == Type::boolean) return false;
  const float real = static_cast<float>(number);
  return node.value == (node.type == Type::f32 ? int64_t{std::bit_cast<uint32_t>(real)} : int64_t{number});
}

class Simplifier {
 public:
  // The number, in the new graph, of a node that equals this one, whose operands are numbers of the new graph.
  int32_t add(const Node &node) {
    const int32_t same = existing(node);
    if (same >= 0) return same;
    if (folds(node)) return add_once(folded(node));
    return add_once(node);
  }

  Graph take() { return std::move(graph_); }

 private:
  const Node &at(const Node &node, int32_t operand) const { return graph_.nodes[node.operands[operand]]; }

  // An operand that the node equals, bit by bit, or -1.
  int32_t existing(const Node &node) const {
    const auto [a, b, c] = std::array{node.operands[0], node.operands[1], node.operands[2]};
    const bool whole = node.type != Type::f32;  // x + 0 would turn a float's -0 into 0
    switch (node.op) {
      case Op::Add:
        if (whole && is_number(at(node, 1), 0)) return a;
        return whole && is_number(at(node, 0), 0) ? b : -1;
      case Op::Sub:
        return is_number(at(node, 1), 0) ? a : -1;
      case Op::Mul:
        if (is_number(at(node, 1), 1)) return a;
        return is_number(at(node, 0), 1) ? b : -1;
      case Op::Div:
        return is_number(at(node, 1), 1) ? a : -1;
      case Op::Shl:
      case Op::Shr:
        return is_number(at(node, 1), 0) ? a : -1;
      case Op::Where:
        if (b == c) return b;
        return is_const(at(node, 0)) ? (at(node, 0).value != 0 ? b : c) : -1;
      case Op::ToBool:
      case Op::ToI32:
      case Op::ToI64:
      case Op::ToF32:
        return at(node, 0).type == node.type ? a : -1;
      default:
        return -1;
    }
  }

  bool folds(const Node &node) const {
    if (node.op == Op::Load || node.num_operands == 0) return false;
    for (const int32_t operand : node.inputs()) {
      if (!is_const(graph_.nodes[operand])) return false;
    }
    return true;
  }

  // A sum, product, quotient or root of floats in double precision, rounded once more, is what f32 arithmetic gives.
  Node folded(const Node &node) const {
    Value operands[3];
    for (int32_t n = 0; n < node.num_operands; ++n) {
      const Node &from = at(node, n);
      operands[n] = {.real = from.type == Type::f32 ? double{from.real()} : 0.0, .integer = from.value};
    }
    const Type type = at(node, node.num_operands - 1).type;
    const Value value = apply(node.op, type, std::span(operands, static_cast<size_t>(node.num_operands)));
    Node result{.op = Op::Const, .type = node.type, .value = value.integer};
    if (node.type == Type::f32) {
      float rounded = static_cast<float>(value.real);
      if (rounded != rounded) rounded = std::numeric_limits<float>::quiet_NaN();
      result.value = std::bit_cast<uint32_t>(rounded);
    }
    return result;
  }

  int32_t add_once(Node node) {
    node.depends = 0;  // set when the node is added
    const auto [known, is_new] = numbers_.try_emplace(node, 0);
    if (is_new) known->second = graph_.add_copy(node);
    return known->second;
  }

  Graph graph_;
  std::map<Node, int32_t> numbers_;
};

// Copies the needed nodes of a graph by way of `add`, which may return an earlier node.
template <class Add>
std::vector<int32_t> copy_needed(const Graph &graph, Add add) {
  const std::vector<bool> is_needed = needed(graph, graph.results);
  std::vector<int32_t> moved(graph.nodes.size(), -1);
  for (size_t n = 0; n < graph.nodes.size(); ++n) {
    if (!is_needed[n]) continue;
    Node node = graph.nodes[n];
    for (int32_t k = 0; k < node.num_operands; ++k) node.operands[k] = moved[node.operands[k]];
    moved[n] = add(node);
  }
  std::vector<int32_t> results;
  results.reserve(graph.results.size());
  for (const int32_t result : graph.results) results.push_back(moved[result]);
  return results;
}

}  // namespace

Graph simplified(const Graph &graph) {
  Simplifier simplifier;
  const std::vector<int32_t> results = copy_needed(graph, [&](const Node &node) { return simplifier.add(node); });
  Graph merged = simplifier.take();
  merged.results = results;
  Graph small;
  small.results = copy_needed(merged, [&](const Node &node) { return small.add_copy(node); });
  return small;
}

Graph simplified_function(const Graph &graph) {
  Graph simple = simplified(graph);
  simple.num_tensors = graph.num_tensors;
  simple.num_scalars = graph.num_scalars;
  return simple;
}

}  // namespace flashspark::graph
