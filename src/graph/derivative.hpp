// The derivative of a score function, as a graph.
#pragma once

#include <cstdint>
#include <vector>

#include "graph/graph.hpp"

namespace flashspark::graph {

struct LoadGradient {
  int32_t node;    // the load, in the function's graph: its indices say where the gradient belongs
  int32_t tensor;  // the captured tensor
};

struct Derivative {
  // results[0]: the derivative of the function's first result by the score; results[1 + n]: by the element that
  // loads[n] reads.
  Graph graph;
  // Every load of floating-point elements, in node order.
  std::vector<LoadGradient> loads;
};

// Where a function has no derivative it is what torch takes: 0 for steps (floor, sign, comparisons, integers), sign(0)
// = 0 for abs, half of it for each of two equal operands of min or max. Throws if the result is not f32 or the
// derivative needs more nodes than a graph may have.
Derivative derivative(const Graph &graph);

// All that the backward pass of a score asks of its function, as one graph. Its results are the function's value, its
// derivative by the score, and of each load first that by what it has read, then its indices.
struct ScoreGradients {
  struct Load {
    int32_t tensor, rank;
  };
  Graph graph;
  std::vector<Load> loads;
};

// The loads are those of tensors whose bit is set in `wanted`. Throws as derivative() does.
ScoreGradients score_gradients(const Graph &score, uint32_t wanted);

}  // namespace flashspark::graph
