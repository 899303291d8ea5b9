// Graphs as CUDA C++: the type UserFunctions that a kernel with functions is compiled with
// (kernels/attention/function_mod.cuh).
#pragma once

#include <string>

#include "graph/derivative.hpp"
#include "graph/graph.hpp"

namespace flashspark::graph {

struct CudaSource {
  std::string text;
  int32_t row_words = 0;  // 32-bit words that the kernel keeps of each row
};

struct CudaSourceOptions {
  // Positions may reach 2^23: the difference of two is then no longer exact as a float, and stays an integer.
  bool wide_positions = false;
  // Of a backward kernel whose pairs of warps hand on P^T: a score function that adds to the score what does not depend
  // on it is written as for a forward kernel.
  bool biases = false;
};

// `score` and `mask`: simplified(), NULL where there is none. The mask's tensors and scalars follow the score's in the
// kernel's arguments.
CudaSource cuda_source(const Graph *score, const Graph *mask, const CudaSourceOptions &options = {});
// The same for a backward kernel (kernels/backward/function_mod.cuh).
CudaSource cuda_gradient_source(const ScoreGradients *score, const Graph *mask, const CudaSourceOptions &options = {});

}  // namespace flashspark::graph
