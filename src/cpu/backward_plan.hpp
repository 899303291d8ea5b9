// The jobs of a backward pass, and where their sums lie.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/backward_tile.hpp"
#include "cpu/mask.hpp"

namespace flashspark::cpu {

// A tile of query rows, and the keys that any of them keeps.
struct BackwardRowTile {
  int64_t row0;
  int32_t rows;
  std::vector<Interval> spans;

  bool sees(int64_t begin, int64_t end) const {
    return std::any_of(spans.begin(), spans.end(), [&](const Interval &s) { return s.begin < end && s.end > begin; });
  }
};

// A KV head of a sequence, with its query heads.
struct BackwardHead {
  Sequence s;
  int64_t h_kv;
  int64_t rows;          // packed
  Interval keys;         // from the first to the last key that a row keeps: no other is read
  size_t row_tiles;      // index of its tiles: heads without lists of their own share them
  int64_t first_common;  // of its packed rows among those of all heads
  int64_t first_job = 0;
  int32_t shares = 1;          // jobs
  int64_t first_partial = -1;  // of its jobs' dq among all partial ones; -1: the only job writes dq itself

  int64_t key_tiles() const { return (keys.end - keys.begin + kBackwardKeys - 1) / kBackwardKeys; }
};

// Takes the tiles of keys share, share + shares, .. of a head.
struct BackwardJob {
  size_t head;
  int32_t share;
  int64_t cost;
};

struct BackwardPlan {
  explicit BackwardPlan(const BackwardParams &p);

  // Floats of a head's dq: whole row groups.
  int64_t dq_floats(const BackwardHead &head) const;

  int32_t threads;
  std::vector<BackwardHead> heads;
  std::vector<std::vector<BackwardRowTile>> row_tiles;
  std::vector<BackwardJob> jobs;
  int64_t common_rows = 0;     // packed rows of all heads
  int64_t partial_floats = 0;  // of dq
  int64_t parts = 1;           // of jobs, each with sums of captured tensors of its own

 private:
  void find_heads();
  std::vector<BackwardRowTile> cut_rows(const Sequence &s, int64_t h_kv) const;
  int64_t shares_of(const BackwardHead &head) const;
  void cut_into_jobs();

  const BackwardParams &p_;
  const Params &f_;
  int64_t group_;
};

}  // namespace flashspark::cpu
