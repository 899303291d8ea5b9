// Small grids: a tile of keys is of several CTAs. All tiles of all heads stand in one row, and each CTA has an equal
// part of it, whose pieces it takes from the last one to the first. So the piece that ends a tile is the last one of
// its CTA, and those before it, of the CTAs before this one, are the first of theirs: sums of dk and dv which they
// leave in memory are there when they are asked for. CTAs begin in order, so that none waits for one that has not
// begun.
#pragma once

#include "backward/scores.cuh"

namespace flashspark {

// A tile in that row: positions [first, end), of which those from first_block on are its blocks of rows, head by head.
// The ones before stand for what it takes to begin and end a tile.
struct TileSpan {
  int32_t head;  // a KV head, of all sequences
  int32_t tile;
  int32_t first, first_block, end;
};

// The tiles of all heads, one after another. All sequences have the same lengths. All threads of a warp call it.
template <class T>
struct TileRow {
  static constexpr int32_t kTileBlocks = T::kTile.tile_blocks();
  const BackwardArguments &a;

  FLASHSPARK_DEVICE int32_t length(int32_t tile) const {
    if (tile >= a.num_key_tiles) return 0;
    const int32_t keys = min_of(a.max_seqlen_k, a.key_rows);
    const SequenceMask mask{0, 0, keys, keys - a.max_seqlen_q, a.causal != 0, 0};
    const Interval blocks = visited_blocks<T>(a, mask, tile * T::kKeys, a.max_seqlen_q);
    return kTileBlocks + (blocks.end - blocks.begin) * static_cast<int32_t>(a.group.value);
  }
  FLASHSPARK_DEVICE TileSpan find(int32_t position) const {
    const Quotient at = divide(position, a.head_length);
    int32_t first = position - at.remainder;
    for (int32_t base = 0;; base += 32) {
      const int32_t own = length(base + ptx::lane()), passed = prefix_sum(own);
      const uint32_t beyond = ptx::ballot(first + passed > position);
      if (beyond == 0) {
        first += ptx::shuffle(passed, 31);
        continue;
      }
      const uint32_t winner = ptx::lowest_bit(beyond);
      const int32_t end = first + ptx::shuffle(passed, winner), begin = end - ptx::shuffle(own, winner);
      return {ptx::uniform(at.quotient), ptx::uniform(base + static_cast<int32_t>(winner)), ptx::uniform(begin),
              ptx::uniform(begin + kTileBlocks), ptx::uniform(end)};
    }
  }
};

// What a CTA does at a time: some blocks of a tile, or all.
struct Piece {
  KeyTile tile;
  int32_t first, end;  // blocks, head by head; end: -1: all of the tile
  int32_t tile_first;  // position of the tile's first block
  int32_t rest;        // where what is left of the CTA's part ends; -1: nothing is
  bool ends_tile;      // whether the CTA joins what all have of the tile: the tile's last block is among its own
  bool is_second;      // of walks: the tile is the second one of its CTA's walk
};

// Where a CTA's part begins, and that of the one before ends.
FLASHSPARK_DEVICE int32_t first_position(const BackwardArguments &a, int32_t cta) {
  return cta * a.piece_length + min_of(cta, a.longer_pieces);
}

FLASHSPARK_DEVICE Piece whole_tile(const BackwardArguments &a) {
  return {find_key_tile(a, static_cast<int32_t>(ptx::cta_x())), 0, -1, 0, -1, true, false};
}

// The piece that ends where the CTA's part does, or at `rest` of the piece before. All threads of a warp call it.
template <class T>
FLASHSPARK_DEVICE Piece find_piece(const BackwardArguments &a, int32_t rest = INT32_MAX) {
  const auto cta = static_cast<int32_t>(ptx::cta_x());
  const int32_t begin = first_position(a, cta), end = min_of(rest, first_position(a, cta + 1));
  Piece p{};
  if (begin >= end) return p;
  const TileSpan span = TileRow<T>{a}.find(end - 1);
  p.tile = dense_key_tile(a, span.head, span.tile);
  p.first = max_of(begin - span.first_block, 0), p.end = max_of(end - span.first_block, 0);
  p.tile_first = span.first_block;
  p.rest = begin < span.first ? span.first : -1;
  p.ends_tile = end == span.end;
  return p;
}

// What is needed behind the loop over blocks, from before it: a warp's own, in shared memory.
template <class T>
FLASHSPARK_DEVICE ptx::SharedAddress kept_piece() {
  return ptx::shared_memory() + T::kMemory.pieces + ptx::warp() * kPieceBytes;
}
// of_head: blocks that the tile visits of a head.
template <class T>
FLASHSPARK_DEVICE void keep_piece(const Piece &p, int32_t of_head) {
  ptx::warp_barrier();  // all lanes have loaded the one before
  if (ptx::lane() != 0) return;
  const KeyTile &tile = p.tile;
  const int32_t words[12] = {tile.head_kv,
                             tile.first,
                             tile.number,
                             static_cast<int32_t>(tile.batch),
                             static_cast<int32_t>(tile.row),
                             tile.held,
                             p.first,
                             p.end,
                             p.tile_first,
                             p.rest,
                             p.ends_tile | p.is_second << 1,
                             of_head};
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 12; n += 4) {
    ptx::Vector16 v;
    FLASHSPARK_UNROLL
    for (int32_t e = 0; e < 4; ++e) v.word[e] = static_cast<uint32_t>(words[n + e]);
    ptx::store_shared_16(kept_piece<T>() + n * 4, v);
  }
}
template <class T>
FLASHSPARK_DEVICE Piece load_piece() {
  ptx::warp_barrier();  // the warp's first lane has kept it
  int32_t words[12];
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 12; n += 4) {
    const ptx::Vector16 v = ptx::load_shared_16(kept_piece<T>() + n * 4);
    FLASHSPARK_UNROLL
    for (int32_t e = 0; e < 4; ++e) words[n + e] = ptx::uniform(static_cast<int32_t>(v.word[e]));
  }
  Piece p{};
  p.tile.head_kv = words[0], p.tile.first = words[1], p.tile.number = words[2];
  p.tile.batch = words[3], p.tile.row = words[4], p.tile.held = words[5];
  p.first = words[6], p.end = words[7], p.tile_first = words[8], p.rest = words[9], p.ends_tile = (words[10] & 1) != 0;
  p.is_second = (words[10] & 2) != 0;
  return p;
}

// What the CTA has added to dq of each head of the piece, so that postprocess begins with a head when its sums are
// complete, while others still store dk and dv. Behind a barrier before which all have added.
template <class T>
FLASHSPARK_DEVICE void count_added_blocks(const BackwardArguments &a, const Piece &p) {
  if (ptx::thread_index() != 0) return;
  const auto group = static_cast<int32_t>(a.group.value);
  int32_t *const to = a.added_blocks + static_cast<int32_t>(p.tile.batch) * a.num_heads_kv * group +
                      (T::kHasWalks ? p.tile.number : p.tile.head_kv * group);
  const auto of_head = static_cast<int32_t>(ptx::load_shared_4(kept_piece<T>() + 11 * 4));
  FLASHSPARK_NO_UNROLL
  for (int32_t first = p.first; first < p.end;) {
    const int32_t head = quotient(first, of_head), end = min_of(p.end, (head + 1) * of_head);
    ptx::count_in_memory(to + head, end - first);
    first = end;
  }
}

// What a warp leaves of its sums for the CTA that ends the tile, as add_gradient() orders it; columns before: those of
// dk, for dv.
template <class T>
FLASHSPARK_DEVICE float *piece_sums_of_warp(const BackwardArguments &a, int32_t cta, bool of_values, int32_t columns) {
  float *const sums =
      a.piece_sums + static_cast<int64_t>(cta) * (T::kKeys * (T::kHeadDim + T::kHeadDimV)) + ptx::lane() * 4;
  return sums + (of_values ? T::kKeys * T::kHeadDim : 0) + T::key_warp() * T::kWarpKeys * columns;
}
template <class T, int32_t columns>
FLASHSPARK_DEVICE void leave_gradient(float *to, const KeyGradient<T, columns> &gradient) {
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < columns / 8; ++n) {
      ptx::Vector16 four;
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) four.word[e] = ptx::as_word(gradient.at[m][n][e]);
      *reinterpret_cast<ptx::Vector16 *>(to + (m * (columns / 8) + n) * 128) = four;
    }
  }
}
template <class T, int32_t columns>
FLASHSPARK_DEVICE void add_left_gradient(KeyGradient<T, columns> &gradient, const float *from) {
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < columns / 8; ++n) {
      const ptx::Vector16 four = *reinterpret_cast<const ptx::Vector16 *>(from + (m * (columns / 8) + n) * 128);
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) gradient.at[m][n][e] += ptx::as_float(four.word[e]);
    }
  }
}

// A warp's sums of a piece: where it ends the tile, those of the CTAs before are added to them, in order; else they are
// left for the one that does.
template <class T>
struct PieceSums {
  const BackwardArguments &a;

  FLASHSPARK_DEVICE int32_t *flag(int32_t slot) const { return a.piece_flags + slot * T::kWarps + ptx::warp(); }
  template <class F>
  FLASHSPARK_DEVICE void for_each(int32_t cta, KeyGradient<T, T::kHeadDim> &dk, KeyGradient<T, T::kHeadDimV> &dv,
                                  const F &f) const {
    const bool of_values = T::kPaired && T::sums_values();
    if ((of_values ? a.dv : a.dk) != nullptr) f(dk, piece_sums_of_warp<T>(a, cta, of_values, T::kHeadDim));
    if constexpr (!T::kPaired) {
      if (a.dv != nullptr) f(dv, piece_sums_of_warp<T>(a, cta, true, T::kHeadDimV));
    }
  }
  FLASHSPARK_DEVICE void leave(int32_t slot, KeyGradient<T, T::kHeadDim> &dk, KeyGradient<T, T::kHeadDimV> &dv) const {
    for_each(slot, dk, dv, [](const auto &gradient, float *to) { leave_gradient<T>(to, gradient); });
  }
  // What the warp has left is there. It takes until all of it is written, so that it is better said a while later.
  FLASHSPARK_DEVICE void raise_flag(int32_t slot) const {
    ptx::warp_barrier();  // all lanes have
    if (ptx::lane() == 0) ptx::raise_in_memory(flag(slot), 1);
  }
  FLASHSPARK_DEVICE void add(int32_t slot, KeyGradient<T, T::kHeadDim> &dk, KeyGradient<T, T::kHeadDimV> &dv) const {
    if (ptx::lane() == 0) ptx::wait_until_at_least(flag(slot), 1);
    ptx::warp_barrier();
    for_each(slot, dk, dv, [](auto &gradient, const float *from) { add_left_gradient<T>(gradient, from); });
  }
  FLASHSPARK_DEVICE void join(const Piece &piece, KeyGradient<T, T::kHeadDim> &dk,
                              KeyGradient<T, T::kHeadDimV> &dv) const {
    FLASHSPARK_NO_UNROLL
    for (auto cta = static_cast<int32_t>(ptx::cta_x()); first_position(a, cta) > piece.tile_first; --cta)
      add(cta - 1, dk, dv);
  }
};

}  // namespace flashspark
