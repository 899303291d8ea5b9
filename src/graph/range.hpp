// What integers of a graph can be, as far as is easily known.
#pragma once

#include <vector>

#include "graph/graph.hpp"

namespace flashspark::graph {

struct Range {
  double low, high;  // of an integer node; any other node has the widest range

  bool within(double limit) const { return low >= -limit && high <= limit; }
};

// `max_position`: neither q_idx nor kv_idx, nor a sequence's length, is above it.
std::vector<Range> ranges(const Graph &graph, double max_position);

}  // namespace flashspark::graph
