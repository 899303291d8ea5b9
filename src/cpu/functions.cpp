#include "cpu/functions.hpp"

#include <algorithm>
#include <limits>

#include "error.hpp"

namespace flashspark::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

void mark(const flashspark_block_list &list, int64_t b, int64_t h, int64_t query_block, BlockStatus status,
          std::vector<BlockStatus> &statuses) {
  if (list.counts == nullptr) return;
  const auto [count, blocks] = row_of(list, b, h, query_block);
  for (int32_t n = 0; n < count; ++n) statuses[static_cast<size_t>(blocks[n])] = status;
}

bool keeps(const RowMask &mask, int64_t key) {
  return (key >= mask.first.begin && key < mask.first.end) || (key >= mask.second.begin && key < mask.second.end);
}

}  // namespace

std::vector<BlockStatus> block_statuses(const Params &p, int64_t b, int64_t h, int64_t query_block) {
  std::vector<BlockStatus> statuses(static_cast<size_t>(key_blocks(p)), BlockStatus::none);
  const int64_t of_b = p.block_batch > 1 ? b : 0, of_h = p.block_heads > 1 ? h : 0;
  mark(p.masked_blocks, of_b, of_h, query_block, BlockStatus::masked, statuses);
  mark(p.full_blocks, of_b, of_h, query_block, BlockStatus::full, statuses);
  return statuses;
}

std::vector<Interval> listed_keys(const Params &p, const Sequence &s, int64_t first_head, int64_t last_head,
                                  int64_t first, int64_t last) {
  std::vector<bool> listed(static_cast<size_t>(key_blocks(p)));
  for (int64_t h = first_head; h <= (p.block_heads > 1 ? last_head : first_head); ++h) {
    for (int64_t block = first / p.block_size_q; block <= last / p.block_size_q; ++block) {
      const std::vector<BlockStatus> statuses = block_statuses(p, s.index, h, block);
      for (size_t n = 0; n < statuses.size(); ++n) listed[n] = listed[n] || statuses[n] != BlockStatus::none;
    }
  }
  std::vector<Interval> keys;
  for (size_t n = 0; n < listed.size(); ++n) {
    if (!listed[n]) continue;
    const int64_t begin = static_cast<int64_t>(n) * p.block_size_k, end = begin + p.block_size_k;
    if (!keys.empty() && keys.back().end == begin) {
      keys.back().end = end;
    } else {
      keys.push_back({begin, end});
    }
  }
  return keys;
}

std::vector<Interval> intersection(const std::vector<Interval> &a, const std::vector<Interval> &b) {
  std::vector<Interval> both;
  for (size_t n = 0, m = 0; n < a.size() && m < b.size();) {
    const Interval common{std::max(a[n].begin, b[m].begin), std::min(a[n].end, b[m].end)};
    if (!common.empty()) both.push_back(common);
    (a[n].end < b[m].end ? n : m) += 1;
  }
  return both;
}

void IndexErrors::add(const char *function, const graph::BadIndex &bad, const graph::Row &row, int64_t key) {
  const std::lock_guard lock(mutex_);
  const Place place{row.b, row.h, row.q_idx, key};
  if (first_ && *first_ <= place) return;
  first_ = place;
  text_ = std::string(function) + ": index " + std::to_string(bad.index) + " of captured tensor " +
          std::to_string(bad.tensor) + " is outside dimension " + std::to_string(bad.dimension) + " of " +
          std::to_string(bad.size) + " (b " + std::to_string(row.b) + ", h " + std::to_string(row.h) + ", q_idx " +
          std::to_string(row.q_idx) + ", kv_idx " + std::to_string(key) + ")";
}

void IndexErrors::throw_first() const {
  if (first_) throw Error(FLASHSPARK_INVALID_ARGUMENT, text_);
}

graph::Row function_row(const Params &p, const Sequence &s, int64_t i, int64_t h) {
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  return {narrow(s.index),
          narrow(h),
          narrow(i),
          narrow(s.seqlen_q),
          narrow(s.seqlen_k),
          narrow(is_varlen_q(p) ? s.q_row : 0),
          narrow(is_varlen_k(p) ? s.k_row : 0)};
}

Functions::Functions(const Params &p) : p_(p), score_(p.score_mod), mask_(p.mask_mod) {}

bool Functions::apply(const Sequence &s, int64_t i, int64_t h, int64_t key, double &score) const {
  const graph::Row row = function_row(p_, s, i, h);
  BlockStatus status = BlockStatus::masked;
  if (has_block_lists(p_))
    status = block_statuses(p_, s.index, h, i / p_.block_size_q)[static_cast<size_t>(key / p_.block_size_k)];
  if (status == BlockStatus::none) return false;
  const auto evaluate = [&](const char *name, const flashspark_function &function, const FunctionBindings &bindings) {
    const graph::Evaluation result =
        graph::evaluate(function.mod->graph, bindings.get(), row, static_cast<int32_t>(key), score);
    if (result.bad_index.found) errors_.add(name, result.bad_index, row, key);
    return result.value;
  };
  if (p_.mask_mod.mod != nullptr && status == BlockStatus::masked && evaluate("mask_mod", p_.mask_mod, mask_) == 0)
    return false;
  if (has_score()) score = evaluate("score_mod", p_.score_mod, score_);
  return true;
}

void TileFunctions::start(const Functions &functions, const Tile &tile) {
  functions_ = &functions, tile_ = &tile;
  rows_.clear();
  for (int64_t r = 0; r < tile.rows; ++r)
    rows_.push_back(function_row(functions.params(), tile.s, tile.token(r), tile.head(r)));
  lists_.clear();
  if (has_block_lists(functions.params())) find_lists();
}

// Neighbouring rows share lists, so that a tile has few.
void TileFunctions::find_lists() {
  const Params &p = functions_->params();
  std::vector<std::pair<int64_t, int64_t>> known;  // query head or 0, query block
  list_of_row_.clear();
  for (const graph::Row &row : rows_) {
    const std::pair<int64_t, int64_t> wanted{p.block_heads > 1 ? row.h : 0, row.q_idx / p.block_size_q};
    const auto found = std::find(known.begin(), known.end(), wanted);
    list_of_row_.push_back(static_cast<size_t>(found - known.begin()));
    if (found != known.end()) continue;
    known.push_back(wanted);
    lists_.push_back(block_statuses(p, row.b, row.h, wanted.second));
  }
  statuses_.clear();
  for (size_t block = 0; block < lists_[0].size(); ++block) {
    const BlockStatus first = lists_[0][block];
    const bool same = std::all_of(lists_.begin(), lists_.end(), [&](const auto &list) { return list[block] == first; });
    statuses_.push_back(same ? static_cast<Status>(first) : Status::differ);
  }
}

void TileFunctions::apply(int64_t first, int64_t rows, int64_t key, int64_t count, float *scores, int64_t row_stride,
                          int64_t key_stride) {
  if (lists_.empty()) return apply_piece({first, rows, key, count, scores, row_stride, key_stride}, Status::masked);
  const int64_t size = functions_->params().block_size_k;
  for (int64_t n = 0; n < count;) {
    int64_t block = (key + n) / size, end = n;
    const Status status = statuses_[static_cast<size_t>(block)];
    for (; end < count && statuses_[static_cast<size_t>(block)] == status; ++block)
      end = std::min(count, (block + 1) * size - key);
    apply_piece({first, rows, key + n, end - n, scores + n * key_stride, row_stride, key_stride}, status);
    n = end;
  }
}

void TileFunctions::apply_piece(const Piece &piece, Status status) {
  const Params &p = functions_->params();
  if (status == Status::none) {
    for (int64_t r = 0; r < piece.rows; ++r) {
      for (int64_t n = 0; n < piece.count; ++n) piece.row(r)[n * piece.key_stride] = kMinusInfinity;
    }
    return;
  }
  bool score_is_outside = false;
  if (functions_->has_score()) {
    flags_.assign(piece.flag(piece.rows, 0), 0);
    graph::OutOfRange outside{.flags = flags_.data()};
    p.score_mod.mod->program.score_tile(functions_->score_bindings(), rows_.data() + piece.first,
                                        static_cast<int32_t>(piece.rows), static_cast<int32_t>(piece.key),
                                        static_cast<int32_t>(piece.count), piece.scores, piece.row_stride,
                                        piece.key_stride, &outside);
    score_is_outside = outside.found;
  }
  if (status == Status::differ || (status == Status::masked && p.mask_mod.mod != nullptr)) drop(piece, status);
  if (score_is_outside) report("score_mod", p.score_mod, functions_->score_bindings(), piece, flags_, true);
}

// -inf for the keys that mask_mod or the lists drop.
void TileFunctions::drop(const Piece &piece, Status status) {
  const Params &p = functions_->params();
  keep_.assign(piece.flag(piece.rows, 0), 1);
  graph::OutOfRange outside{};
  if (p.mask_mod.mod != nullptr) {
    mask_flags_.assign(keep_.size(), 0);
    outside.flags = mask_flags_.data();
    p.mask_mod.mod->program.mask_tile(functions_->mask_bindings(), rows_.data() + piece.first,
                                      static_cast<int32_t>(piece.rows), static_cast<int32_t>(piece.key),
                                      static_cast<int32_t>(piece.count), keep_.data(), &outside);
  }
  if (status == Status::differ) follow_lists(piece, outside.found);
  for (int64_t r = 0; r < piece.rows; ++r) {
    const uint8_t *kept = keep_.data() + piece.flag(r, 0);
    float *s = piece.row(r);
    if (piece.key_stride == 1) {
      for (int64_t n = 0; n < piece.count; ++n) s[n] = kept[n] != 0 ? s[n] : kMinusInfinity;
    } else {
      for (int64_t n = 0; n < piece.count; ++n) {
        if (kept[n] == 0) s[n * piece.key_stride] = kMinusInfinity;
      }
    }
  }
  if (outside.found) report("mask_mod", p.mask_mod, functions_->mask_bindings(), piece, mask_flags_, false);
}

// What a row's own lists say of blocks that do not ask mask_mod. outside: it has read indices outside their tensors,
// which do not count there.
void TileFunctions::follow_lists(const Piece &piece, bool outside) {
  const int64_t size = functions_->params().block_size_k;
  for (int64_t r = 0; r < piece.rows; ++r) {
    const std::vector<BlockStatus> &list = lists_[list_of_row_[static_cast<size_t>(piece.first + r)]];
    for (int64_t n = 0; n < piece.count;) {
      const int64_t block = (piece.key + n) / size, end = std::min(piece.count, (block + 1) * size - piece.key);
      const BlockStatus status = list[static_cast<size_t>(block)];
      if (status != BlockStatus::masked) {
        const size_t at = piece.flag(r, n), length = static_cast<size_t>(end - n);
        std::fill_n(keep_.begin() + static_cast<int64_t>(at), length, uint8_t{status == BlockStatus::full});
        if (outside) std::fill_n(mask_flags_.begin() + static_cast<int64_t>(at), length, uint8_t{0});
      }
      n = end;
    }
  }
}

// The first flagged place that counts: the row keeps the key. drops_are_known: the scores of dropped keys are -inf; not
// for mask_mod itself, whose value does not say whether its index counts.
void TileFunctions::report(const char *name, const flashspark_function &function, const graph::Bindings &bindings,
                           const Piece &piece, const std::vector<uint8_t> &flags, bool drops_are_known) const {
  for (int64_t r = 0; r < piece.rows; ++r) {
    const graph::Row &row = rows_[static_cast<size_t>(piece.first + r)];
    for (int64_t n = 0; n < piece.count; ++n) {
      const int64_t key = piece.key + n;
      if (flags[piece.flag(r, n)] == 0 || !keeps(tile_->mask(piece.first + r), key)) continue;
      if (drops_are_known && piece.row(r)[n * piece.key_stride] == kMinusInfinity) continue;
      const graph::Evaluation again =
          graph::evaluate(function.mod->graph, bindings, row, static_cast<int32_t>(key), 0.0);
      if (again.bad_index.found) return functions_->errors().add(name, again.bad_index, row, key);
    }
  }
}

}  // namespace flashspark::cpu
