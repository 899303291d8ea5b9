#include "cpu/block_mask.hpp"

#include <algorithm>
#include <vector>

#include "cpu/thread_pool.hpp"
#include "graph/vector_kernels.hpp"
#include "mod.hpp"

namespace flashspark::cpu {
namespace {

using graph::kFails;
using graph::kHolds;

// A tile's keys: as many blocks as make so many, since a tile has costs of its own, and no more than the cache holds.
constexpr int64_t kTileKeys = 128, kMostTileKeys = 1024;
// Rows of a tile: values that depend on the row alone are computed for all of them, also where the first rows decide.
constexpr int64_t kTileRows = 128;

// One row of lists: of sequence b, head h and a query block.
struct ListRow {
  int64_t b, h, block;
};

class Survey {
 public:
  explicit Survey(const BlockMaskParams &p) : p_(p), bindings_(p.mask_mod), asked_(asked_for(p)) {}

  int64_t rows() const { return asked_.seqs * asked_.heads * query_blocks(p_); }
  void run(int64_t n) const {
    const int64_t blocks = query_blocks(p_);
    const ListRow row{n / blocks / asked_.heads, n / blocks % asked_.heads, n % blocks};
    thread_local std::vector<uint8_t> seen;
    look(row, seen);
    for (int64_t b = row.b; b < p_.num_seqs; b += asked_.seqs) {
      for (int64_t h = row.h; h < p_.num_heads; h += asked_.heads)
        write(seen, (b * p_.num_heads + h) * blocks + row.block);
    }
  }

 private:
  void look(const ListRow &row, std::vector<uint8_t> &seen) const;
  void look_at_tile(const std::vector<graph::Row> &rows, int64_t first_block, int64_t blocks, uint8_t *seen) const;
  void write(const std::vector<uint8_t> &seen, int64_t to) const;

  const BlockMaskParams &p_;
  const FunctionBindings bindings_;
  const AskedFor asked_;
};

// What is seen in each key block. Where a block sticks out of the sequence, its scores there count as dropped.
void Survey::look(const ListRow &row, std::vector<uint8_t> &seen) const {
  const int64_t key_count = key_blocks(p_), first = row.block * p_.block_size_q;
  const int64_t end = std::min(first + p_.block_size_q, p_.seqlen_q);
  seen.assign(static_cast<size_t>(key_count), first + p_.block_size_q > p_.seqlen_q ? kFails : uint8_t{0});
  if (key_count * p_.block_size_k > p_.seqlen_k) seen.back() = kFails;
  // Several blocks in a tile begin at whole vectors.
  const int64_t in_tile =
      p_.block_size_k % graph::kLanes == 0 ? std::max<int64_t>(kTileKeys / p_.block_size_k, 1) : int64_t{1};
  thread_local std::vector<graph::Row> rows;
  for (int64_t begin = first; begin < end; begin += kTileRows) {
    rows.clear();
    for (int64_t i = begin; i < std::min(begin + kTileRows, end); ++i) {
      rows.push_back({static_cast<int32_t>(row.b), static_cast<int32_t>(row.h), static_cast<int32_t>(i),
                      static_cast<int32_t>(p_.seqlen_q), static_cast<int32_t>(p_.seqlen_k), 0, 0});
    }
    for (int64_t n = 0; n < key_count; n += in_tile)
      look_at_tile(rows, n, std::min(in_tile, key_count - n), seen.data() + n);
  }
}

void Survey::look_at_tile(const std::vector<graph::Row> &rows, int64_t first_block, int64_t blocks,
                          uint8_t *seen) const {
  const int64_t begin = first_block * p_.block_size_k;
  const int64_t end = std::min(begin + blocks * p_.block_size_k, p_.seqlen_k);
  for (int64_t key = begin; key < end; key += kMostTileKeys) {
    if (std::all_of(seen, seen + blocks, [](uint8_t x) { return x == (kHolds | kFails); })) return;
    const auto keys = static_cast<int32_t>(std::min(kMostTileKeys, end - key));
    p_.mask_mod.mod->program.survey_tile(bindings_.get(), rows.data(), static_cast<int32_t>(rows.size()),
                                         static_cast<int32_t>(key), keys,
                                         static_cast<int32_t>(std::min<int64_t>(p_.block_size_k, keys)), seen);
  }
}

// Row `to` of the lists.
void Survey::write(const std::vector<uint8_t> &seen, int64_t to) const {
  const auto list = [&](int32_t *counts, int32_t *indices, auto belongs) {
    int32_t *row = indices + to * static_cast<int64_t>(seen.size());
    const int64_t count = std::count_if(seen.begin(), seen.end(), belongs);
    counts[to] = static_cast<int32_t>(count);
    int32_t *listed = row, *others = row + count;
    for (size_t n = 0; n < seen.size(); ++n) *(belongs(seen[n]) ? listed : others)++ = static_cast<int32_t>(n);
  };
  if (p_.full_counts == nullptr)
    return list(p_.masked_counts, p_.masked_indices, [](uint8_t x) { return (x & kHolds) != 0; });
  list(p_.masked_counts, p_.masked_indices, [](uint8_t x) { return x == (kHolds | kFails); });
  list(p_.full_counts, p_.full_indices, [](uint8_t x) { return x == kHolds; });
}

}  // namespace

void create_block_mask(const BlockMaskParams &p) {
  const Survey survey(p);
  parallel_for(p.num_threads, survey.rows(), [&](int64_t n) { survey.run(n); });
}

}  // namespace flashspark::cpu
