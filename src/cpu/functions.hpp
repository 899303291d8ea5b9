// The user's functions and block lists on the CPU: for the engine, a tile at a time; for the oracle, a key at a time.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/mask.hpp"
#include "cpu/tile.hpp"
#include "graph/evaluate.hpp"
#include "mod.hpp"

namespace flashspark::cpu {

// What a list says of a key block.
enum class BlockStatus : uint8_t { none, masked, full };

// Of all key blocks, for one sequence, query head and query block.
std::vector<BlockStatus> block_statuses(const Params &p, int64_t b, int64_t h, int64_t query_block);

// The keys of listed blocks, for tokens [first, last] and query heads [first_head, last_head], in order and disjoint.
std::vector<Interval> listed_keys(const Params &p, const Sequence &s, int64_t first_head, int64_t last_head,
                                  int64_t first, int64_t last);
// What two sets of intervals have in common; each is in order and disjoint.
std::vector<Interval> intersection(const std::vector<Interval> &a, const std::vector<Interval> &b);

// Indices that lay outside their tensors, for keys that their rows keep. Calls are computed to their end, and then fail
// with the first one by sequence, head, row and key, whichever thread met it.
class IndexErrors {
 public:
  void add(const char *function, const graph::BadIndex &bad, const graph::Row &row, int64_t key);
  void throw_first() const;

 private:
  using Place = std::tuple<int32_t, int32_t, int32_t, int64_t>;

  std::mutex mutex_;
  std::optional<Place> first_;
  std::string text_;
};

// One call's functions. Constant while rows are computed.
class Functions {
 public:
  explicit Functions(const Params &p);

  bool any() const { return has_functions(p_) || has_block_lists(p_); }
  bool has_score() const { return p_.score_mod.mod != nullptr; }
  IndexErrors &errors() const { return errors_; }

  // The oracle's: `score` becomes what score_mod makes of it. False: the row does not keep the key.
  bool apply(const Sequence &s, int64_t i, int64_t h, int64_t key, double &score) const;

  const Params &params() const { return p_; }
  graph::Bindings score_bindings() const { return score_.get(); }
  graph::Bindings mask_bindings() const { return mask_.get(); }

 private:
  const Params &p_;
  FunctionBindings score_, mask_;
  mutable IndexErrors errors_;
};

// The engine's: a call's functions for one tile. What holds for a row in all key blocks is found once. An object may be
// used for one tile after the other.
class TileFunctions {
 public:
  // Both must outlive the calls of apply().
  void start(const Functions &functions, const Tile &tile);

  // Rows [first, first + rows) of the tile's first KV head against keys [key, key + count). Scores are at
  // scores[(r - first) * row_stride + n * key_stride], in natural units if there is a score function, and stay so;
  // those of keys that a function or a list drops become -inf.
  void apply(int64_t first, int64_t rows, int64_t key, int64_t count, float *scores, int64_t row_stride,
             int64_t key_stride);

  const Functions &functions() const { return *functions_; }
  const graph::Row *rows() const { return rows_.data(); }

 private:
  // A part of apply()'s work in which all rows and keys have one status, or in which they differ.
  struct Piece {
    int64_t first, rows, key, count;
    float *scores;
    int64_t row_stride, key_stride;

    float *row(int64_t r) const { return scores + r * row_stride; }
    size_t flag(int64_t r, int64_t n) const { return static_cast<size_t>(r * count + n); }
  };
  enum class Status : uint8_t { none, masked, full, differ };  // the first three are BlockStatus's

  void find_lists();
  void apply_piece(const Piece &piece, Status status);
  void drop(const Piece &piece, Status status);
  void follow_lists(const Piece &piece, bool outside);
  void report(const char *name, const flashspark_function &function, const graph::Bindings &bindings,
              const Piece &piece, const std::vector<uint8_t> &flags, bool drops_are_known) const;

  const Functions *functions_ = nullptr;
  const Tile *tile_ = nullptr;
  std::vector<graph::Row> rows_;
  std::vector<std::vector<BlockStatus>> lists_;  // different ones of the tile's rows; empty without lists
  std::vector<size_t> list_of_row_;
  std::vector<Status> statuses_;                    // of each key block, in all of lists_
  std::vector<uint8_t> keep_, flags_, mask_flags_;  // of a piece, (rows, keys)
};

graph::Row function_row(const Params &p, const Sequence &s, int64_t i, int64_t h);

}  // namespace flashspark::cpu
