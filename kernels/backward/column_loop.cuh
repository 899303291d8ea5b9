// The main loop where warps share out the columns of dK and dV (KeySharing::columns), as heads of 192 and 256 columns
// need it. Two warps have the same 16 keys: one computes P^T of them and sums dV, the other one dS^T and dK.
//
//   for each step of 16 rows                             the next step's Q and dO are copied meanwhile
//     dQ += dS K of the step before                      all keys; half of the warps
//     S^T = K Q^T, dP^T = V dO^T, P^T                    warp's keys
//     dV += P^T dO, dK += dS^T Q of the step before      all keys, warp's columns
//     dS^T                                               warp's keys
//     dQ += dS K of the step before                      the other half
//     barrier: P^T, dS^T and the next step's rows are here; all are done with the rows of the step before
//
// What a warp adds to dQ keeps its registers and the way to memory, shared memory, too, busy for long. So half of the
// warps do it while the other half are at their products.
#pragma once

#include "backward/column_products.cuh"
#include "backward/epilogue.cuh"
#include "backward/row_loader.cuh"
#include "backward/turns.cuh"

namespace flashspark {

// Where the loop is: a block of rows, or the end, and the block before it; and where their steps lie in shared memory.
struct ColumnWalk {
  RowWalk at, last;
  int32_t left, count;         // blocks from `at` on, and all
  int32_t before, now, after;  // slots of the rows of the step before, of this one and of the next one
  int32_t values;              // stage of the block's lse and delta
};

template <class T>
struct ColumnLoop {
  using Element = typename T::Element;
  using Layout = typename T::KeyLayout;
  static constexpr int32_t kStep = T::kScoreRows, kBlockSteps = 2;
  static constexpr int32_t kRowBytes = kStep * Layout::kPitch;           // of Q or dO of a step
  static constexpr int32_t kScoreBytes = T::kKeys * StepLayout::kPitch;  // of P^T or dS^T
  static constexpr int32_t kRowThreads = T::kThreads / 2 / kStep;
  static_assert(T::kRows == kBlockSteps * kStep && T::kMAtoms == 1 && kRowThreads == Layout::kGroup);

  const BackwardArguments &a;
  KeyMask mask;
  int32_t first_key, first_padded_row, tokens;
  ptx::SharedAddress shared;
  int32_t warp;  // uniform
  Turns<T> turns;
  ColumnLane<T> lane;
  // What the thread copies next, of Q in half of the warps, of dO in the other half; and where to in a slot.
  const Element *from;
  ptx::SharedAddress to;

  KeyOperand<T, T::kHeadDim, true> keys = {};  // or values
  ColumnGradient<T> gradient = {};

  FLASHSPARK_DEVICE bool values_summed() const { return (warp % 2 == 0) == (warp / 4 % 2 == 0); }
  FLASHSPARK_DEVICE int32_t pair() const { return warp / 2; }
  FLASHSPARK_DEVICE int32_t warp_key() const { return first_key + pair() * T::kWarpKeys; }
  FLASHSPARK_DEVICE bool copies_queries() const { return warp < T::kWarps / 2; }
  FLASHSPARK_DEVICE const Strides &strides() const { return copies_queries() ? a.q_strides : a.dout_strides; }

  FLASHSPARK_DEVICE ptx::SharedAddress queries(int32_t slot) const {
    return shared + T::kMemory.queries + slot * (2 * kRowBytes);
  }
  FLASHSPARK_DEVICE ptx::SharedAddress douts(int32_t slot) const { return queries(slot) + kRowBytes; }
  FLASHSPARK_DEVICE ptx::SharedAddress probabilities(int32_t half) const {
    return shared + T::kMemory.probabilities + half * kScoreBytes;
  }
  FLASHSPARK_DEVICE ptx::SharedAddress dscores(int32_t half) const {
    return shared + T::kMemory.dscores + half * kScoreBytes;
  }
  FLASHSPARK_DEVICE ptx::SharedAddress rows(int32_t stage) const {
    return shared + T::kMemory.rows + stage * T::kMemory.row_stage;
  }
  // lse of the lane's first two rows of a step; delta lies T::kRows floats behind it.
  FLASHSPARK_DEVICE ptx::SharedAddress row_values(const ColumnWalk &w, int32_t half) const {
    return rows(w.values) + half * (kStep * 4) + lane.score_store % 16 * 2;  // lane % 4 * 8
  }

  // The thread's row of a step, and its first chunk of 16 bytes.
  static FLASHSPARK_DEVICE int32_t copied_row() {
    return static_cast<int32_t>(ptx::thread_index()) / kRowThreads % kStep;
  }
  static FLASHSPARK_DEVICE int32_t copied_chunk() { return static_cast<int32_t>(ptx::thread_index()) % kRowThreads; }

  // Steps are copied in order, each of them once. Rows past the sequence and columns past the head become 0.
  template <int32_t half>
  FLASHSPARK_DEVICE void copy_step(const RowWalk &at, int32_t slot) {
    constexpr int32_t kLoads = Layout::kChunks / kRowThreads;
    const int32_t first = at.block * T::kRows + half * kStep;
    const int32_t columns = copies_queries() ? a.head_dim : a.head_dim_v;
    const ptx::SharedAddress target = to + slot * (2 * kRowBytes);
    if (first + kStep <= tokens && columns == T::kHeadDim) {
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kLoads; ++n)
        ptx::cp_async_16(Layout::step(target, n * kRowThreads), from + n * kRowThreads * 8);
    } else {
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kLoads; ++n) {
        const bool valid = first + copied_row() < tokens && (copied_chunk() + n * kRowThreads) * 8 < columns;
        const void *any = a.q;
        ptx::cp_async_16_or_zero(Layout::step(target, n * kRowThreads), valid ? from + n * kRowThreads * 8 : any,
                                 valid);
      }
    }
    from += kStep * strides().token;
    if (half == 1 && at.is_last_of_head()) from += strides().head - (at.end - at.begin) * T::kRows * strides().token;
  }
  FLASHSPARK_DEVICE void copy_values(const RowWalk &at, int32_t stage) const {
    if (warp != 0) return;
    ptx::warp_barrier();  // a branch, which the other warps do not take
    copy_row_values<T>(a, first_padded_row, at, rows(stage), static_cast<uint32_t>(ptx::lane()));
  }

  // S^T or dP^T of a step, and P^T; false where the warp's keys and the step's rows do not see each other, where zeros
  // are all there is.
  template <int32_t half>
  FLASHSPARK_DEVICE bool begin_scores(ScoreTile<T> &scores, const ColumnWalk &w) {
    const int32_t token = w.at.block * T::kRows + half * kStep;
    const Interval visited = mask.visited(warp_key(), T::kWarpKeys), unmasked = mask.unmasked(warp_key(), T::kWarpKeys);
    ScoreOperand<T> operand{};
    if (token >= visited.end || token + kStep <= visited.begin) {
      store_scores(operand, values_summed() ? probabilities(half) : dscores(half), lane);
      return false;
    }
    if (!values_summed()) begin_with_delta<T>(scores, row_values(w, half) + T::kRows * 4);
    score_product(scores, keys, queries(w.now) + (values_summed() ? 0 : kRowBytes), lane);
    if (!values_summed()) return true;
    if (token < unmasked.begin || token + kStep > unmasked.end) mask_score_tile(scores, mask, warp_key(), token);
    scores_to_probabilities(scores, a.scale_log2, row_values(w, half));
    pack_scores(operand, scores);
    store_scores(operand, probabilities(half), lane);
    ptx::pair_arrive(pair(), half);
    return true;
  }
  // dS^T from dP^T and the other warp's P^T.
  template <int32_t half>
  FLASHSPARK_DEVICE void end_scores(ScoreTile<T> &scores) {
    if (values_summed()) return;
    ptx::pair_wait(pair(), half);
    multiply_by_stored(scores, probabilities(half), lane);
    ScoreOperand<T> operand{};
    pack_scores(operand, scores);
    store_scores(operand, dscores(half), lane);
  }
  // Of the step before one of this half.
  template <int32_t half>
  FLASHSPARK_DEVICE void add_gradient(const ColumnWalk &w) {
    const bool of_values = values_summed();
    gradient_product(gradient, of_values ? probabilities(1 - half) : dscores(1 - half),
                     queries(w.before) + (of_values ? kRowBytes : 0), lane);
  }
  // Of the step before one of this half.
  template <int32_t half>
  FLASHSPARK_DEVICE void add_to_dq(const ColumnWalk &w) {
    const RowWalk &at = half == 1 ? w.at : w.last;
    ColumnSums<T> dq{};
    query_product(dq, dscores(1 - half), shared, lane, warp);
    const int64_t row = static_cast<int64_t>(at.head) * a.padded_rows + first_padded_row + at.block * T::kRows;
    add_query_gradient(a.dq_sum + (row + (1 - half) * kStep) * T::kHeadDim, dq, warp);
  }

  // The block's step `half`, where it has one; and what is left to do of the step before.
  template <int32_t half, bool in_turn>
  FLASHSPARK_DEVICE void step(ColumnWalk &w) {
    if (in_turn && half == 1 && w.left < w.count) turns.pass(w.last);
    const bool here = w.left > 0, gradient_left = half == 1 ? here : w.left < w.count;
    if constexpr (half == 0) {
      if (here) copy_step<1>(w.at, w.after);
    } else if (w.left > 1) {
      const RowWalk next = w.at.next();
      copy_step<0>(next, w.after);
      copy_values(next, 1 - w.values);
    }
    ptx::cp_async_commit();
    const bool dq_left =
        gradient_left && a.dq_sum != nullptr && (ColumnSums<T>::kHalf || values_summed() == (half == 0));
    const bool dq_first = warp < T::kWarps / 2;
    if (dq_left && dq_first) add_to_dq<half>(w);
    ScoreTile<T> scores{};
    const bool seen = here && begin_scores<half>(scores, w);
    if (gradient_left) add_gradient<half>(w);
    if (seen) end_scores<half>(scores);
    if (dq_left && !dq_first) add_to_dq<half>(w);
    if (in_turn && half == 0 && here) turns.wait(mask, w.at);
    ptx::cp_async_wait<0>();
    ptx::cta_barrier();
    const int32_t freed = w.before;
    w.before = w.now, w.now = w.after, w.after = freed;
  }

  // K and V are in flight. A loop with turns stands beside the other one, as in BackwardLoop.
  FLASHSPARK_DEVICE void run(Interval blocks, int32_t first_head, int32_t count) {
    if (a.dq_turns != nullptr) {
      run<true>(blocks, first_head, count);
    } else {
      run<false>(blocks, first_head, count);
    }
  }

  template <bool in_turn>
  FLASHSPARK_DEVICE void run(Interval blocks, int32_t first_head, int32_t count) {
    const RowWalk at{blocks.begin, blocks.end, first_head, blocks.begin};
    from += at.head * strides().head + at.block * T::kRows * strides().token;
    copy_step<0>(at, 0);
    copy_values(at, 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    ptx::cta_barrier();  // K and V are here
    load_keys(values_summed() ? shared : shared + T::kMemory.values);
    ptx::cp_async_wait<0>();
    ptx::cta_barrier();  // all have V in registers; the first rows are here
    ColumnWalk w{at, at, count, count, 2, 0, 1, 0};
    FLASHSPARK_NO_UNROLL
    for (;; --w.left) {
      step<0, in_turn>(w);
      if (w.left == 0) break;
      step<1, in_turn>(w);
      w.last = w.at, w.at = w.at.next(), w.values = 1 - w.values;
    }
    if constexpr (in_turn) turns.pass(w.last);
  }

 private:
  FLASHSPARK_DEVICE void load_keys(ptx::SharedAddress memory) {
    memory += pair() * T::kWarpKeys * Layout::kPitch;
    const uint32_t of_rows = T::Mma::template value_lane_offset<Layout>(static_cast<uint32_t>(ptx::lane()));
    FLASHSPARK_UNROLL
    for (int32_t d = 0; d < T::kHeadDim / 16; ++d)
      ptx::ldmatrix_x4(keys.at[0][d], memory + Layout::step(of_rows, 2 * d));
  }
};

template <class T>
FLASHSPARK_DEVICE ColumnLoop<T> make_column_loop(const BackwardArguments &a, const SequenceMask &mask,
                                                 const RowTile &rows, int32_t first_key, int32_t first_padded_row,
                                                 const Turns<T> &turns) {
  using Loop = ColumnLoop<T>;
  const int32_t warp = ptx::uniform(ptx::warp()), row = Loop::copied_row(), chunk = Loop::copied_chunk();
  const auto q = make_row_loader<QueryLoader<T>>(a, rows, a.q, a.q_strides, a.head_dim);
  const auto dout = make_row_loader<GradientLoader<T>>(a, rows, a.dout, a.dout_strides, a.head_dim_v);
  const ptx::SharedAddress shared = ptx::shared_memory();
  Loop loop{
      a, key_mask(a, mask), first_key, first_padded_row, q.tokens, shared, warp, turns, column_lane<T>(warp), nullptr,
      0};
  const bool of_queries = loop.copies_queries();
  loop.from = (of_queries ? q.data : dout.data) + row * loop.strides().token + chunk * 8;
  loop.to = keep_in_register((of_queries ? loop.queries(0) : loop.douts(0)) +
                             Loop::Layout::offset(static_cast<uint32_t>(row), static_cast<uint32_t>(chunk)));
  return loop;
}

// Rows of a gradient pass whole through shared memory, in which each warp puts its columns together.
template <class T>
FLASHSPARK_DEVICE void store_column_gradients(const ColumnLoop<T> &loop) {
  using Element = typename T::Element;
  using Layout = typename T::KeyLayout;
  constexpr int32_t kColumns = T::kGradientColumns / 8, kChunks = T::kHeadDim / 8;
  const BackwardArguments &a = loop.a;
  const KeyTile tile = find_key_tile(a, static_cast<int32_t>(ptx::cta_x()));
  const bool of_values = loop.values_summed();
  const int32_t lane = ptx::lane(), part = loop.pair();
  if (a.head_parts > 1) {
    float *to = of_values ? a.dv_sum : a.dk_sum;
    if (to == nullptr) return;
    to += (static_cast<int64_t>(tile.number) * (T::kKeys / 16) * kChunks + part * kColumns) * 128 + lane * 4;
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kKeys / 16; ++m) {
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kColumns; ++n) ptx::add_to_memory_4(to + (m * kChunks + n) * 128, loop.gradient.at[m][n]);
    }
    return;
  }
  const float scale = of_values ? 1.0f : a.softmax_scale;
  const ptx::SharedAddress shared = loop.shared + (of_values ? T::kKeys * Layout::kPitch : 0);
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kKeys / 16; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) {
      const uint32_t row = Layout::offset(static_cast<uint32_t>(m * 16 + x * 8 + lane / 4), 0) + lane % 4 * 4;
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kColumns; ++n)
        ptx::store_shared_4(
            shared + Layout::step(row, static_cast<uint32_t>(part * kColumns + n)),
            ptx::pack<Element>(loop.gradient.at[m][n][2 * x] * scale, loop.gradient.at[m][n][2 * x + 1] * scale));
    }
  }
  ptx::cta_barrier();
  auto *to = static_cast<Element *>(of_values ? a.dv : a.dk);
  if (to == nullptr) return;
  const Strides &strides = of_values ? a.dv_strides : a.dk_strides;
  const int32_t columns = of_values ? a.head_dim_v : a.head_dim;
  to += tile.batch * strides.batch + tile.row * strides.token + tile.head_kv * strides.head;
  FLASHSPARK_NO_UNROLL
  for (int32_t n = lane; n < T::kWarpKeys * kChunks; n += 32) {
    const int32_t row = part * T::kWarpKeys + n / kChunks, chunk = n % kChunks, key = tile.first + row;
    const ptx::Vector16 v = ptx::load_shared_16(
        shared + Layout::step(Layout::offset(static_cast<uint32_t>(row), 0), static_cast<uint32_t>(chunk)));
    if (key < tile.held && chunk * 8 < columns) store_8(to + key * strides.token + chunk * 8, v);
  }
}

}  // namespace flashspark
