// The oracle: a graph's value for one row and one key, in double precision. It shares no arithmetic with the CPU
// engine's vector code (vector.hpp), which the tests compare with it.
#pragma once

#include <cstdint>
#include <span>

#include "graph/bindings.hpp"
#include "graph/graph.hpp"

namespace flashspark::graph {

// A node's value: f32 nodes use `real`, all others `integer` (bool: 0 or 1).
struct Value {
  double real = 0;
  int64_t integer = 0;
};

// The first index, in node order, that lay outside its tensor.
struct BadIndex {
  bool found = false;
  int32_t tensor = 0, dimension = 0;
  int64_t index = 0, size = 0;
};

struct Evaluation {
  double value;     // bool and integers as doubles
  int64_t integer;  // of a bool or integer result, exactly; 0 for f32
  BadIndex bad_index;
};

// Only the nodes that this result needs are evaluated. `score` is ignored if the graph does not read it.
Evaluation evaluate(const Graph &graph, const Bindings &bindings, const Row &row, int32_t kv_idx, double score,
                    int32_t result = 0);

// The value of a node that computes from other nodes (no input, scalar or load), given its operands' values. `type` is
// that of its last operand.
Value apply(Op op, Type type, std::span<const Value> operands);

}  // namespace flashspark::graph
