// Where a piece's rows and keys are, and how its keys and values come.
#pragma once

#include "attention/tile_loader.cuh"
#include "backward/pieces.cuh"

namespace flashspark {

struct PieceRows {
  RowTile rows;
  Keys keys;
  SequenceMask mask;
  Interval blocks;  // of a head
  int32_t count;    // of all heads
};
template <class T, bool native = T::kNative>
FLASHSPARK_DEVICE PieceRows rows_of(const BackwardArguments &a, const Piece &piece) {
  const KeyTile &tile = piece.tile;
  const SequenceRows in_use = queries_of(a, read_query_lengths(a, tile.seq));
  RowTile rows{};
  rows.seq = tile.seq;
  rows.head_kv = tile.head_kv;
  rows.seqlen_q = ptx::uniform(in_use.tokens);
  rows.q_row = ptx::uniform(in_use.row);
  const Keys keys = find_keys(a, tile.seq);
  const SequenceMask mask = sequence_mask(a, rows, keys, is_causal(a, tile.seq));
  const Interval blocks = uniform(visited_blocks<T, native>(a, mask, tile.first, rows.seqlen_q));
  const int32_t end = piece.end < 0 ? (blocks.end - blocks.begin) * tile.num_heads_q : piece.end;
  return {rows, keys, mask, blocks, end - piece.first};
}

template <class T>
FLASHSPARK_DEVICE void copy_keys_and_values(const BackwardArguments &a, int32_t first, const PieceRows &p) {
  KeyBounds visited = no_keys();
  visited.visited[0] = {first, min_of(first + T::kKeys, p.keys.end)};
  const KeyTileCopy<T> copy = make_tile_copy<T>(a, p.keys, visited);
  const ptx::SharedAddress shared = ptx::shared_memory(), values = shared + T::kMemory.values;
  make_tile_loader<T, KVOperand::key>(a, p.rows, p.keys).copy(copy, first / T::kKeys, shared);
  make_tile_loader<T, KVOperand::value>(a, p.rows, p.keys).copy(copy, first / T::kKeys, values);
  ptx::cp_async_commit();
}

}  // namespace flashspark
