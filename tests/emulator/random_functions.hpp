// Random score and mask functions, the same for the program that writes their CUDA source and the test that runs it.
#pragma once

#include <string>

#include "support/functions.hpp"
#include "support/random_graph.hpp"

namespace flashspark::emulator {

constexpr uint64_t kRandomFunctions = 60;

class RandomFunctions {
 public:
  explicit RandomFunctions(uint64_t seed)
      : seed_(seed),
        score_graph(2 * seed, wish(graph::Type::f32)),
        mask_graph(2 * seed + 1, wish(graph::Type::boolean)) {
    score = test::tamed(score_graph.graph, true);
    mask = mask_graph.graph;
  }
  std::string name() const { return "random_" + std::to_string(seed_); }

 private:
  test::GraphWish wish(graph::Type result) const {
    test::GraphWish wish;
    wish.result = result, wish.depth = static_cast<int>(2 + seed_ % 7), wish.max_magnitude = 8, wish.max_nodes = 80;
    return wish;
  }
  uint64_t seed_;

 public:
  test::RandomGraph score_graph, mask_graph;
  graph::Graph score, mask;
};

}  // namespace flashspark::emulator
