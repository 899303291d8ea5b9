// What the loops over blocks of rows have in common, with the user's functions and without: where a block lies in
// shared memory, its copies, the mbarriers of two stages of all, and which of its rows a warp's keys see.
#pragma once

#include "attention/tile_loader.cuh"
#include "backward/pair_block.cuh"
#include "backward/row_loader.cuh"

namespace flashspark {

template <class T_, class Arguments>
struct RowLoop {
  using T = T_;
  const Arguments &a;
  int32_t first_key;  // of the CTA
  int32_t first_padded_row;
  QueryLoader<T> q;
  GradientLoader<T> dout;
  ptx::SharedAddress shared;
  BackwardOffsets<T> lane;

  // Of a pair: `keys` is its operand, K or V, and dk its sums.
  KeyOperand<T, T::kHeadDim, T::kTile.keys_in_registers> keys;
  KeyOperand<T, T::kHeadDimV, T::kTile.values_in_registers> values;
  KeyGradient<T, T::kHeadDim> dk;
  KeyGradient<T, T::kHeadDimV> dv;

  // By a product, instructions have the constant part of an address in them.
  static FLASHSPARK_DEVICE int32_t of_stage(int32_t stage, int32_t first, int32_t second) {
    if constexpr (T::kStages == RowStages::all) return first + stage * (second - first);
    return stage == 0 ? first : second;
  }
  FLASHSPARK_DEVICE ptx::SharedAddress queries(int32_t stage) const {
    return shared + of_stage(stage, T::kMemory.queries, T::kMemory.second_queries);
  }
  FLASHSPARK_DEVICE ptx::SharedAddress douts(int32_t stage) const {
    return shared + of_stage(stage, T::kMemory.dout, T::kMemory.second_dout);
  }
  FLASHSPARK_DEVICE ptx::SharedAddress dscores(int32_t stage) const {
    return shared + of_stage(stage, T::kMemory.dscores, T::kMemory.second_dscores);
  }
  FLASHSPARK_DEVICE ptx::SharedAddress rows(int32_t stage) const {
    return shared + T::kMemory.rows + stage * T::kMemory.row_stage;
  }
  // lse of a block's rows from the lane's first one of a tile on; delta lies T::kRows floats behind it.
  FLASHSPARK_DEVICE ptx::SharedAddress row_values(int32_t stage, int32_t first_row) const {
    return rows(stage) + first_row * 4 + lane.thread % 4 * 8;
  }
  FLASHSPARK_DEVICE ptx::SharedAddress kept(int32_t stage) const {
    return shared + T::kMemory.kept + stage * T::kMemory.kept_stage;
  }
  FLASHSPARK_DEVICE int32_t warp_key() const { return first_key + lane.warp_key; }

  FLASHSPARK_DEVICE void copy_queries(const RowWalk &at, int32_t stage) {
    q.copy(at, queries(stage), lane.thread);
    copy_row_values<T>(a, first_padded_row, at, rows(stage), lane.thread);
  }
  FLASHSPARK_DEVICE void copy_dout(const RowWalk &at, int32_t stage) { dout.copy(at, douts(stage), lane.thread); }

  // Of a block's first row in scratch memory.
  FLASHSPARK_DEVICE int64_t padded_row(const RowWalk &at) const {
    return static_cast<int64_t>(at.head) * a.padded_rows + first_padded_row + at.block * T::kRows;
  }
  FLASHSPARK_DEVICE void add_to_dq(const RowWalk &at, int32_t stage) { add_to_dq(padded_row(at), stage); }
  // row: of the sums; sign: less than 0 where none has added to it.
  FLASHSPARK_DEVICE void add_to_dq(int64_t row, int32_t stage, int32_t sign = 0) {
    float *const to = a.dq_sum + row * T::kHeadDim;
    QueryGradient<T> dq{};
    query_product(dq, dscores(stage), shared, lane);
    add_query_gradient(to, dq, lane, sign);
  }

  // A phase of the one ends when a block's Q and dO are here, and dS^T of the block before; of the other one when all
  // are done with a block. The parity of the block's stage is that of both phases.
  FLASHSPARK_DEVICE ptx::SharedAddress ready() const { return shared + T::kMemory.barriers; }
  FLASHSPARK_DEVICE ptx::SharedAddress done() const { return shared + T::kMemory.barriers + 8; }
  // With dropout: all have multiplied dS^T of the block before.
  FLASHSPARK_DEVICE ptx::SharedAddress summed() const { return shared + T::kMemory.barriers + 16; }
  FLASHSPARK_DEVICE void begin_barriers() {
    if (lane.thread == 0) {
      ptx::mbarrier_init(ready(), T::kWarps);
      ptx::mbarrier_init(done(), T::kWarps);
      if constexpr (T::kDropout) ptx::mbarrier_init(summed(), T::kWarps);
    }
    ptx::cta_barrier();  // all have V in registers
  }
  FLASHSPARK_DEVICE void arrive_ready() {
    ptx::cp_async_wait<0>();
    ptx::mbarrier_arrive(ready());
  }

  // Tokens within which a block has to lie so that some of its rows see some of the warp's keys.
  FLASHSPARK_DEVICE Interval seen_rows(const KeyMask &mask) const {
    const Interval visited = mask.visited(warp_key(), T::kWarpKeys);
    return {visited.begin - T::kRows + 1, visited.end + T::kRows - 1};
  }
  static FLASHSPARK_DEVICE bool lies_in(const RowWalk &at, const Interval &tokens) {
    return at.block * T::kRows >= tokens.begin && (at.block + 1) * T::kRows <= tokens.end;
  }
};

}  // namespace flashspark
