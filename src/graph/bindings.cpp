#include "graph/bindings.hpp"

#include "error.hpp"

namespace flashspark::graph {
namespace {

std::string dtype_text(int32_t dtype) {
  if (dtype < 0 || dtype >= kNumDataTypes) return "an unknown data type (" + std::to_string(dtype) + ")";
  return name(static_cast<DataType>(dtype));
}

void check_tensor(int32_t number, const Capture &expected, const AuxTensor &given) {
  const auto refuse = [&](const std::string &rule) {
    throw Error(FLASHSPARK_INVALID_ARGUMENT, "captured tensor " + std::to_string(number) + rule);
  };
  if (given.dtype != static_cast<int32_t>(expected.dtype))
    refuse(": the graph reads " + std::string(name(expected.dtype)) + ", given is " + dtype_text(given.dtype));
  if (given.rank != expected.rank) {
    refuse(": the graph reads a tensor of rank " + std::to_string(expected.rank) + ", given is one of rank " +
           std::to_string(given.rank));
  }
  for (int32_t n = 0; n < given.rank; ++n) {
    if (given.shape[n] <= 0 || given.shape[n] > INT32_MAX)
      refuse(": dimension " + std::to_string(n) + " has size " + std::to_string(given.shape[n]) +
             (given.shape[n] <= 0 ? ": must be positive" : ": must be at most 2^31 - 1"));
  }
  if (given.data == nullptr) refuse(" has no data");
  if (reinterpret_cast<uintptr_t>(given.data) % static_cast<uintptr_t>(size_of(expected.dtype)) != 0)
    refuse(": its data must be aligned to its elements, " + std::to_string(size_of(expected.dtype)) + " bytes");
}

void check_count(const char *what, int32_t expected, size_t given) {
  if (given >= static_cast<size_t>(expected)) return;
  throw Error(FLASHSPARK_INVALID_ARGUMENT, "the graph reads " + std::to_string(expected) + " " + what + ", given " +
                                               (given == 1 ? "is 1" : "are " + std::to_string(given)));
}

}  // namespace

void check(const Graph &graph, const Bindings &bindings) {
  check_count("captured tensors", graph.num_tensors, bindings.tensors.size());
  check_count("scalars", graph.num_scalars, bindings.scalars.size());
  for (int32_t n = 0; n < graph.num_tensors; ++n) {
    if (graph.captures[n].rank >= 0) check_tensor(n, graph.captures[n], bindings.tensors[n]);
  }
}

}  // namespace flashspark::graph
