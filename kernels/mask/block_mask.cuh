// The block lists of a mask function, in one kernel and without memory for scores or blocks.
//
// A CTA makes one row of the lists, of a sequence, a head and a query block. Its warps take one key block each: lanes
// hold keys, and the rows' words (Mask::row) come out of shared memory, so that what depends on a row or on a key alone
// is computed once for each. A score costs the function itself and two instructions: one notes whether any is kept, one
// whether any is dropped. Once both are, the block is done. After every round of kBlockMaskRound blocks a prefix sum
// puts them into the lists in order. How many blocks a list has is known at the end only, so what does not belong to it
// is written from the row's end towards its beginning, and turned around then.
#pragma once

#include "attention/functions.cuh"
#include "mask/arguments.hpp"

namespace flashspark {

constexpr uint32_t kMaskKeeps = 1, kMaskDrops = 2, kMaskBoth = 3;  // what has been seen of a block

template <class Mask>
struct BlockMaskShared {
  static constexpr int32_t kRows = block_mask_rows(Mask::kWords);
  static constexpr int32_t kUnroll = kRows < 8 ? kRows : 8;  // rows between two looks at whether the block is done
  static constexpr uint32_t kStatuses = kRows * Mask::kWords * 4, kTotals = kStatuses + kBlockMaskRound * 4;
};

// The row of the lists.
struct ListRow {
  int32_t b, h, block;
};

// Calls f(number of the row) for the row and for those that are the same.
template <class F>
FLASHSPARK_DEVICE void for_each_copy(const BlockMaskArguments &a, const ListRow &row, F &&f) {
  for (int32_t b = row.b; b < a.num_seqs; b += a.asked_seqs) {
    for (int32_t h = row.h; h < a.num_heads; h += a.asked_heads)
      f((static_cast<int64_t>(b) * a.num_heads + h) * a.num_blocks_q + row.block);
  }
}

// All threads write the words of query rows `rows`, and of the last once more until they are a multiple of kUnroll.
template <class Mask>
FLASHSPARK_DEVICE void write_mask_rows(const BlockMaskArguments &a, const ListRow &row, Interval rows,
                                       ptx::SharedAddress shared) {
  constexpr int32_t kUnroll = BlockMaskShared<Mask>::kUnroll;
  const int32_t count = ceil_div(rows.end - rows.begin, kUnroll) * kUnroll;
  if constexpr (Mask::kWords > 0) {
    FLASHSPARK_NO_UNROLL
    for (auto n = static_cast<int32_t>(ptx::thread_index()); n < count; n += kBlockMaskThreads) {
      const FunctionRow at{row.b, row.h, min_of(rows.begin + n, rows.end - 1), a.seqlen_q, a.seqlen_k, 0, 0};
      uint32_t words[Mask::kWords];
      Mask::row(a.functions, at, 1.0f, words);
      FLASHSPARK_UNROLL
      for (int32_t word = 0; word < Mask::kWords; ++word)
        ptx::store_shared_4(shared + (n * Mask::kWords + word) * 4, words[word]);
    }
  }
}

// What a warp sees of keys `keys` in `rows` rows of shared memory, added to `seen`, which is the same in all lanes.
template <class Mask, int32_t lane_keys>
FLASHSPARK_DEVICE uint32_t look_at_block(const BlockMaskArguments &a, int32_t rows, Interval keys,
                                         ptx::SharedAddress shared, uint32_t seen) {
  constexpr int32_t kUnroll = BlockMaskShared<Mask>::kUnroll;
  FLASHSPARK_NO_UNROLL
  for (int32_t first = keys.begin; first < keys.end; first += 32 * lane_keys) {
    FunctionKey key[lane_keys];
    typename Mask::Key at[lane_keys];
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < lane_keys; ++n) {
      // Lanes past the end look at the last key once more.
      const int32_t idx = min_of(first + 32 * n + ptx::lane(), keys.end - 1);
      key[n] = FunctionKey{idx, static_cast<float>(idx), 0.0f};
      at[n] = Mask::key(a.functions, key[n]);
    }
    FLASHSPARK_NO_UNROLL
    for (int32_t row = 0; row < rows; row += kUnroll) {
      bool keeps = false, drops = false;
      FLASHSPARK_UNROLL
      for (int32_t r = 0; r < kUnroll; ++r) {
        uint32_t words[Mask::kWords + 1];
        FLASHSPARK_UNROLL
        for (int32_t word = 0; word < Mask::kWords; ++word)
          words[word] = ptx::load_shared_4(shared + ((row + r) * Mask::kWords + word) * 4);
        FLASHSPARK_UNROLL
        for (int32_t n = 0; n < lane_keys; ++n) {
          const bool kept = Mask::keep(a.functions, words, at[n], key[n]);
          keeps = keeps || kept;
          drops = drops || !kept;
        }
      }
      if (ptx::any(keeps)) seen |= kMaskKeeps;
      if (ptx::any(drops)) seen |= kMaskDrops;
      if (seen == kMaskBoth) return seen;
    }
  }
  return seen;
}

// Thread n puts block round + n into the lists. listed: how many the lists have, before and after.
FLASHSPARK_DEVICE void add_to_lists(const BlockMaskArguments &a, const ListRow &row, int32_t round, uint32_t seen,
                                    ptx::SharedAddress totals, int32_t (&listed)[2]) {
  const int32_t block = round + static_cast<int32_t>(ptx::thread_index());
  const bool exists = block < a.num_blocks_k, two_lists = a.counts[1] != nullptr;
  const bool belongs[2] = {exists && (two_lists ? seen == kMaskBoth : (seen & kMaskKeeps) != 0),
                           exists && two_lists && seen == kMaskKeeps};
  // Both sums in one word: neither is above kBlockMaskRound.
  const int32_t mine = (belongs[0] ? 1 : 0) + (belongs[1] ? 1 << 16 : 0), sum = prefix_sum(mine);
  if (ptx::lane() == 31) ptx::store_shared_4(totals + ptx::warp() * 4, static_cast<uint32_t>(sum));
  ptx::cta_barrier();
  int32_t before = sum - mine, all = 0;
  FLASHSPARK_UNROLL
  for (int32_t warp = 0; warp < kBlockMaskThreads / 32; ++warp) {
    const auto total = static_cast<int32_t>(ptx::load_shared_4(totals + warp * 4));
    if (warp < ptx::warp()) before += total;
    all += total;
  }
  FLASHSPARK_UNROLL
  for (int32_t list = 0; list < 2; ++list) {
    const int32_t shift = 16 * list, place = listed[list] + (before >> shift & 0xffff);
    const int32_t at = belongs[list] ? place : a.num_blocks_k - 1 - (block - place);
    if (exists && (list == 0 || two_lists)) {
      for_each_copy(a, row, [&](int64_t to) { a.indices[list][to * a.num_blocks_k + at] = block; });
    }
    listed[list] += all >> shift & 0xffff;
  }
}

// Turns what does not belong to the lists around, and writes their lengths.
FLASHSPARK_DEVICE void finish_lists(const BlockMaskArguments &a, const ListRow &row, const int32_t (&listed)[2]) {
  const auto thread = static_cast<int32_t>(ptx::thread_index());
  FLASHSPARK_UNROLL
  for (int32_t list = 0; list < 2; ++list) {
    if (list == 1 && a.counts[1] == nullptr) return;
    for_each_copy(a, row, [&](int64_t to) {
      int32_t *others = a.indices[list] + to * a.num_blocks_k + listed[list];
      const int32_t count = a.num_blocks_k - listed[list];
      for (int32_t n = thread; n < count / 2; n += kBlockMaskThreads) {
        const int32_t first = others[n];
        others[n] = others[count - 1 - n];
        others[count - 1 - n] = first;
      }
      if (thread == 0) a.counts[list][to] = listed[list];
    });
  }
}

// lane_keys: keys that a lane holds at a time, 1, 2 or 4.
template <class Mask, int32_t lane_keys>
FLASHSPARK_DEVICE void make_block_lists(const BlockMaskArguments &a) {
  using Shared = BlockMaskShared<Mask>;
  constexpr int32_t kWarps = kBlockMaskThreads / 32;
  ptx::grid_dependency_wait();
  const ptx::SharedAddress shared = ptx::shared_memory(), statuses = shared + Shared::kStatuses;
  const auto thread = static_cast<int32_t>(ptx::thread_index());
  const auto number = static_cast<int32_t>(ptx::cta_x());
  const int32_t of_seq = quotient(number, a.num_blocks_q), b = quotient(of_seq, a.asked_heads);
  const ListRow row{b, of_seq - b * a.asked_heads, number - of_seq * a.num_blocks_q};
  const int32_t first_row = row.block * a.block_size_q;
  const Interval rows{first_row, min_of(first_row + a.block_size_q, a.seqlen_q)};
  const bool row_ragged = a.ragged_q && row.block == a.num_blocks_q - 1;

  int32_t listed[2] = {0, 0}, held = -1;  // held: the first row of those in shared memory
  FLASHSPARK_NO_UNROLL
  for (int32_t round = 0; round < a.num_blocks_k; round += kBlockMaskRound) {
    const int32_t count = min_of(kBlockMaskRound, a.num_blocks_k - round);
    const bool ragged = row_ragged || (a.ragged_k && round + thread == a.num_blocks_k - 1);
    ptx::store_shared_4(statuses + thread * 4, ragged ? kMaskDrops : 0u);
    FLASHSPARK_NO_UNROLL
    for (int32_t begin = rows.begin; begin < rows.end; begin += Shared::kRows) {
      const Interval some{begin, min_of(begin + Shared::kRows, rows.end)};
      if (begin != held) {
        ptx::cta_barrier();  // nobody reads the rows before any more
        write_mask_rows<Mask>(a, row, some, shared);
        held = begin;
      }
      ptx::cta_barrier();
      FLASHSPARK_NO_UNROLL
      for (int32_t n = ptx::warp(); n < count; n += kWarps) {
        const uint32_t before = ptx::load_shared_4(statuses + n * 4);
        if (before == kMaskBoth) continue;
        const int32_t first_key = (round + n) * a.block_size_k;
        const Interval keys{first_key, min_of(first_key + a.block_size_k, a.seqlen_k)};
        const uint32_t seen = look_at_block<Mask, lane_keys>(a, some.end - some.begin, keys, shared, before);
        ptx::warp_barrier();  // every lane has read the status
        if (ptx::lane() == 0) ptx::store_shared_4(statuses + n * 4, seen);
      }
    }
    ptx::cta_barrier();
    add_to_lists(a, row, round, ptx::load_shared_4(statuses + thread * 4), shared + Shared::kTotals, listed);
  }
  ptx::cta_barrier();  // what other threads wrote into the lists is there
  finish_lists(a, row, listed);
}

}  // namespace flashspark
