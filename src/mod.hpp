// The user's functions on the host: what a flashspark_mod is, and the rules of a call that has one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "graph/bindings.hpp"
#include "graph/derivative.hpp"
#include "graph/graph.hpp"
#include "graph/vector.hpp"
#include "problem.hpp"

namespace flashspark {

// What a score function's gradients are computed with.
struct ScoreDerivative {
  explicit ScoreDerivative(const graph::Graph &function);

  graph::Derivative function;                        // its graph's results, and which loads they belong to
  std::vector<graph::Graph> places;                  // for each of these loads, its indices as results
  std::vector<graph::Program> results;               // of function.graph, compiled one by one
  std::vector<std::vector<graph::Program>> indices;  // of places, the same way
};

}  // namespace flashspark

struct flashspark_mod {
  flashspark_mod(flashspark::graph::Graph simple, uint64_t number, bool makes_scores);

  flashspark::graph::Graph graph;  // simplified
  flashspark::graph::Program program;
  uint64_t id;  // equal functions have equal ids
  bool is_score;
  std::atomic<int32_t> references{1};

  // Words that a kernel keeps of each row; `wide`: with wide positions (cuda_source.hpp). The kernel's source tells, so
  // that it is written when a GPU first asks, not when a function is made.
  int32_t row_words(bool wide) const;

  // Of a score function; made when first asked for. Throws if it is too large.
  const flashspark::ScoreDerivative &derivative() const;

 private:
  struct Words {
    std::once_flag once;
    int32_t count = 0;
  };
  mutable Words words_[2];
  mutable std::once_flag derivative_once_;
  mutable std::unique_ptr<flashspark::ScoreDerivative> derivative_;
};

namespace flashspark {

inline bool has_functions(const Params &p) {
  return p.score_mod.mod != nullptr || p.mask_mod.mod != nullptr;
}
inline bool has_block_lists(const Params &p) {
  return p.masked_blocks.counts != nullptr || p.full_blocks.counts != nullptr;
}

// Blocks that the longest sequence's keys make; at least one.
inline int64_t key_blocks(const Params &p) {
  return std::max<int64_t>((p.max_seqlen_k + p.block_size_k - 1) / p.block_size_k, 1);
}
// A row of a list: of sequence b, query head h and a query block. `indices` is NULL where the list has none.
struct BlockListRow {
  int32_t count;
  const int32_t *indices;
};
inline BlockListRow row_of(const flashspark_block_list &list, int64_t b, int64_t h, int64_t query_block) {
  const int32_t count =
      list.counts[b * list.count_batch_stride + h * list.count_head_stride + query_block * list.count_block_stride];
  if (list.indices == nullptr) return {count, nullptr};  // a list of width 0 has none
  return {count, list.indices + b * list.index_batch_stride + h * list.index_head_stride +
                     query_block * list.index_block_stride};
}

// Throws naming the line; `is_score`: a score function, else a mask function.
flashspark_mod *make_mod(const char *text, bool is_score);

// Of a flashspark_dtype; throws for one that no captured tensor has.
graph::DataType captured_type(int32_t dtype);

// What a call gives to a function, as graphs take it.
class FunctionBindings {
 public:
  explicit FunctionBindings(const flashspark_function &function);
  graph::Bindings get() const { return {tensors_, scalars_}; }

 private:
  std::vector<graph::AuxTensor> tensors_;
  std::span<const double> scalars_;
};

// Sequences and heads for which a mask's function may differ: it is asked about these, and the others get copies.
struct AskedFor {
  int64_t seqs, heads;
};
AskedFor asked_for(const BlockMaskParams &p);

// Rules of score_mod or mask_mod, which may be absent.
void check_function(const flashspark_function &function, bool is_score);

// Rules of functions and block lists; on the CPU the lists themselves are checked, too.
void validate_functions(const Params &p);

}  // namespace flashspark
