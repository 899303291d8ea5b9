// What a call gives to a graph: captured tensors and scalars, and the row that is computed.
#pragma once

#include <cstdint>
#include <span>

#include "graph/graph.hpp"

namespace flashspark::graph {

struct AuxTensor {
  const void *data;
  int32_t dtype;  // a DataType
  int32_t rank;
  int64_t shape[kMaxRank];
  int64_t strides[kMaxRank];  // in elements
};

struct Bindings {
  std::span<const AuxTensor> tensors;
  std::span<const double> scalars;
};

// Counted within the sequence, as in the text. Rows of one tile follow each other: token by token, and within a token
// the query heads of one KV head.
struct Row {
  int32_t b, h, q_idx;
  int32_t seqlen_q, seqlen_k;
  int32_t offset_q, offset_k;
};

// Throws naming the tensor when the bindings are not what the graph reads. A tensor that no node reads may be anything,
// and more of them than the graph knows may be given: a simplified graph may need fewer than the function captured.
void check(const Graph &graph, const Bindings &bindings);

}  // namespace flashspark::graph
