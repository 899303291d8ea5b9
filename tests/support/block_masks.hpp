// Block masks for tests: the lists of a call with their memory, and what they must be, score by score by the oracle.
#pragma once

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "graph/evaluate.hpp"
#include "support/functions.hpp"

namespace flashspark::test {

struct MaskShape {
  int64_t num_seqs = 1, num_heads = 1, seqlen_q = 1, seqlen_k = 1, block_size_q = 128, block_size_k = 128;
  bool separate = true;  // lists of their own for blocks that are seen wholly

  int64_t blocks_q() const { return (seqlen_q + block_size_q - 1) / block_size_q; }
  int64_t blocks_k() const { return (seqlen_k + block_size_k - 1) / block_size_k; }
  int64_t rows() const { return num_seqs * num_heads * blocks_q(); }
  std::string text() const {
    std::ostringstream out;
    out << "B " << num_seqs << ", H " << num_heads << ", " << seqlen_q << " x " << seqlen_k << " in blocks of "
        << block_size_q << " x " << block_size_k << (separate ? "" : ", one list");
    return out.str();
  }
};

// Where several steps and rounds of every kind are: rows and keys that do not fill blocks, lanes, tiles.
inline std::vector<MaskShape> mask_shapes() {
  return {{1, 1, 256, 256, 128, 128},    {2, 3, 70, 130, 64, 64}, {2, 2, 40, 100, 16, 16},
          {1, 2, 50, 77, 17, 23},        {2, 1, 1, 333, 128, 48}, {1, 1, 130, 5, 32, 1},
          {1, 3, 150, 90, 1000, 100000}, {3, 1, 33, 64, 1, 16},   {2, 2, 100, 128, 50, 64, false}};
}

struct MaskLists {
  std::vector<int32_t> masked_counts, masked_indices, full_counts, full_indices;
  bool operator==(const MaskLists &) const = default;
};

inline flashspark_block_mask_params mask_params(const MaskShape &shape, const flashspark_function &mask,
                                                MaskLists &lists) {
  const auto rows = static_cast<size_t>(shape.rows()), blocks = rows * static_cast<size_t>(shape.blocks_k());
  flashspark_block_mask_params p;
  flashspark_block_mask_params_init(&p);
  p.mask_mod = mask;
  p.num_seqs = shape.num_seqs, p.num_heads = shape.num_heads;
  p.seqlen_q = shape.seqlen_q, p.seqlen_k = shape.seqlen_k;
  p.block_size_q = shape.block_size_q, p.block_size_k = shape.block_size_k;
  lists.masked_counts.assign(rows, -7), lists.masked_indices.assign(blocks, -7);
  p.masked_counts = lists.masked_counts.data(), p.masked_indices = lists.masked_indices.data();
  if (!shape.separate) return p;
  lists.full_counts.assign(rows, -7), lists.full_indices.assign(blocks, -7);
  p.full_counts = lists.full_counts.data(), p.full_indices = lists.full_indices.data();
  return p;
}

inline int64_t scores_kept(const MaskShape &shape, const graph::Graph &graph, const graph::Bindings &bindings,
                           int64_t b, int64_t h, int64_t q, int64_t k) {
  int64_t kept = 0;
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  for (int64_t i = q * shape.block_size_q; i < std::min((q + 1) * shape.block_size_q, shape.seqlen_q); ++i) {
    const graph::Row row{narrow(b), narrow(h), narrow(i), narrow(shape.seqlen_q), narrow(shape.seqlen_k), 0, 0};
    for (int64_t j = k * shape.block_size_k; j < std::min((k + 1) * shape.block_size_k, shape.seqlen_k); ++j)
      kept += evaluate(graph, bindings, row, narrow(j), 0).integer;
  }
  return kept;
}

inline MaskLists expected_lists(const MaskShape &shape, const graph::Graph &graph, const graph::Bindings &bindings) {
  MaskLists lists;
  const int64_t all = shape.block_size_q * shape.block_size_k;
  for (int64_t row = 0; row < shape.rows(); ++row) {
    const int64_t q = row % shape.blocks_q(), h = row / shape.blocks_q() % shape.num_heads,
                  b = row / shape.blocks_q() / shape.num_heads;
    std::vector<int32_t> masked, full, not_masked, not_full;
    for (int64_t k = 0; k < shape.blocks_k(); ++k) {
      const int64_t kept = scores_kept(shape, graph, bindings, b, h, q, k);
      const bool is_full = shape.separate && kept == all;
      (is_full ? full : not_full).push_back(static_cast<int32_t>(k));
      (kept > 0 && !is_full ? masked : not_masked).push_back(static_cast<int32_t>(k));
    }
    const auto add = [](std::vector<int32_t> &counts, std::vector<int32_t> &indices, const auto &in, const auto &out) {
      counts.push_back(static_cast<int32_t>(in.size()));
      indices.insert(indices.end(), in.begin(), in.end());
      indices.insert(indices.end(), out.begin(), out.end());
    };
    add(lists.masked_counts, lists.masked_indices, masked, not_masked);
    if (shape.separate) add(lists.full_counts, lists.full_indices, full, not_full);
  }
  return lists;
}

}  // namespace flashspark::test
