// The values of a function written in C, as nodes of its graph: conversions and arithmetic by C's rules, and the
// functions that it may call.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "graph/graph.hpp"
#include "graph/source_tokens.hpp"

namespace flashspark::graph {

// Builds nodes. `line` of each member is where an error belongs.
class SourceValues {
 public:
  explicit SourceValues(Graph &graph) : graph_(graph) {}

  Type type(int32_t node) const { return graph_.nodes[static_cast<size_t>(node)].type; }
  int32_t converted(int32_t node, Type to);
  int32_t integer_literal(const Token &token);
  int32_t real_literal(const Token &token);
  int32_t unary(std::string_view symbol, int32_t operand, int32_t line);
  int32_t binary(std::string_view symbol, int32_t a, int32_t b, int32_t line);
  int32_t select(int32_t condition, int32_t a, int32_t b);
  // Whether there is such a function, with or without `std::`, `__` and `f`.
  static bool is_function(std::string_view name);
  int32_t call(std::string_view name, std::span<const int32_t> operands, int32_t line);
  // A name of a number that headers define: INFINITY, NAN, M_PI, true .. -1: none.
  int32_t constant(std::string_view name);

 private:
  using Operands = std::span<const int32_t>;

  int32_t number(Type type, int32_t value);
  int32_t promoted(int32_t node);
  Type common(int32_t a, int32_t b) const;
  int32_t arithmetic(Op op, int32_t a, int32_t b);
  int32_t whole_division(Op op, int32_t a, int32_t b);
  bool never_negative(int32_t a, int32_t b) const;
  int32_t shift(Op op, int32_t a, int32_t b);
  int32_t rounded_from_zero(int32_t x);
  int32_t floating_remainder(int32_t a, int32_t b);
  int32_t number_of_both(Op op, int32_t a, int32_t b);

  Graph &graph_;
};

}  // namespace flashspark::graph
