// The backward half of a score function on the CPU engine: gradients through it, and those of the tensors it captures.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/functions.hpp"

namespace flashspark::cpu {

// For the tiles that one thread works on, one after the other. The sums of captured tensors are doubles, since very
// many terms may go to one element.
class FunctionGradients {
 public:
  explicit FunctionGradients(const BackwardParams &p);

  // Elements of all sums of a call.
  static int64_t num_sums(const BackwardParams &p);

  // Rows [first, first + rows) of the tile that `functions` has started, against keys [key, key + count). `scores` are
  // those that score_mod got, `ds` the gradients of those that it gave, and becomes that of what it got; both are
  // (rows, count) with `stride` from row to row. A score whose ds is 0 adds nothing, whatever its slope.
  void apply(const TileFunctions &functions, int64_t first, int64_t rows, int64_t key, int64_t count,
             const float *scores, float *ds, int64_t stride);

  // Writes the sums of several objects, in their order.
  static void store(const BackwardParams &p, const std::vector<FunctionGradients> &parts);

 private:
  void add(size_t load, const graph::Row *rows, int64_t num_rows, int64_t key, int64_t count, const float *scores,
           const float *ds, int64_t stride);
  // slopes_ becomes the derivative number `result` of every score.
  void find_slopes(size_t result, const graph::Row *rows, int64_t num_rows, int64_t key, int64_t count,
                   const float *scores, int64_t stride);

  const BackwardParams *p_;
  graph::Bindings bindings_;
  std::vector<std::vector<double>> sums_;  // of each captured tensor, row-major; empty where it is not wanted
  std::vector<float> slopes_;              // (rows, keys)
  std::vector<int64_t> indices_, places_;  // (rows, keys)
};

}  // namespace flashspark::cpu
