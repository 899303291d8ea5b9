// A score or mask function written in C, as a graph (docs/flex.md says what may be written).
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "graph/graph.hpp"

namespace flashspark::graph {

struct SourceFunction {
  Graph graph;
  std::vector<std::string> tensors, scalars;  // names of the parameters; a place is the graph's number
};

// Throws naming the line and what is wrong with it.
SourceFunction parse_source(std::string_view source, bool is_score);

}  // namespace flashspark::graph
