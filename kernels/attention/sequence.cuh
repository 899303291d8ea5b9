// Which rows and keys a sequence has. The kernels read lengths, offsets, page numbers and batch indices on the device,
// where they may hold anything: everything read here is clamped to what exists before it becomes an address, so that no
// metadata leads outside the tensors. Metadata is read for sequences that have query rows, and for nothing else: padded
// rows of a captured batch carry stale lengths and page numbers.
#pragma once

#include "attention/arguments.hpp"
#include "common/math.cuh"

namespace flashspark {

// Consecutive packed rows of one sequence and KV head: a row is one (query token, query head of the group). FA3 calls
// this PackGQA.
struct RowTile {
  bool valid;   // false: no work
  int32_t seq;  // b
  int32_t head_kv;
  int32_t seqlen_q;   // query tokens in use
  int32_t q_row;      // varlen: first token row in q and out; dense: 0
  int32_t first_row;  // of the tile, in packed rows of the sequence
  int32_t end_row;    // packed rows of the sequence
};

// What memory says of a sequence's query rows and keys; 0 where it says nothing.
struct QueryLengths {
  int32_t begin, end, used;
};
struct KeyLengths {
  int32_t begin, end, used, pad;
};
FLASHSPARK_DEVICE int32_t read_length(const int32_t *from, int32_t n) {
  return from != nullptr ? from[n] : 0;
}
FLASHSPARK_DEVICE QueryLengths read_query_lengths(const SequenceArguments &a, int32_t seq) {
  return {read_length(a.cu_seqlens_q, seq), read_length(a.cu_seqlens_q, seq + 1), read_length(a.seqused_q, seq)};
}
FLASHSPARK_DEVICE KeyLengths read_key_lengths(const SequenceArguments &a, int32_t seq) {
  return {read_length(a.cu_seqlens_k, seq), read_length(a.cu_seqlens_k, seq + 1), read_length(a.seqused_k, seq),
          read_length(a.leftpad_k, seq)};
}

// The query rows of a sequence that are in use.
struct SequenceRows {
  int32_t row;  // varlen: of the first token in q and out; dense: 0
  int32_t tokens;
};
// Within q and out, and at most max_seqlen_q tokens, on which grids and scratch memory rely.
FLASHSPARK_DEVICE SequenceRows queries_of(const SequenceArguments &a, const QueryLengths &x) {
  SequenceRows q{0, a.max_seqlen_q};
  if (a.cu_seqlens_q != nullptr) {
    q.row = clamp(x.begin, 0, a.total_q);
    q.tokens = min_of(a.max_seqlen_q, clamp(x.end, q.row, a.total_q) - q.row);
  }
  if (a.seqused_q != nullptr) q.tokens = clamp(x.used, 0, q.tokens);
  return q;
}

// A factor of the row tile's sequence and KV head.
FLASHSPARK_DEVICE float scale_of(const Scale &scale, const RowTile &row_tile) {
  return scale.data == nullptr ? 1.0f
                               : scale.data[row_tile.seq * scale.seq_stride + row_tile.head_kv * scale.head_stride];
}

// The keys of a sequence, counted in rows of its cache: left padding comes first, so that a key's page follows from its
// number alone and a key tile begins where a page may.
struct Keys {
  int32_t begin, end;    // keys in use
  int64_t row;           // varlen: row of k and v where the sequence begins
  int64_t batch;         // dense: which sequence of the cache
  const int32_t *pages;  // this sequence's row of the page table
};

// From lengths that may be of another sequence in every lane. Within k and v.
FLASHSPARK_DEVICE Keys keys_of(const SequenceArguments &a, const KeyLengths &x) {
  Keys keys{};
  int32_t room = a.key_rows, held = a.max_seqlen_k;
  if (a.cu_seqlens_k != nullptr) {
    const int32_t row = clamp(x.begin, 0, a.key_rows);
    held = clamp(x.end, row, a.key_rows) - row;
    room -= row;
    keys.row = row;
  }
  if (a.seqused_k != nullptr) held = x.used;
  keys.begin = clamp(x.pad, 0, room);
  keys.end = clamp(held, keys.begin, room);
  return keys;
}

// The same for one sequence, with its pages. The rules are written out again because ptxas spills 60 to 108 bytes of
// the prefill kernels where keys_of() stands here, or where the page table is looked at before the rest
// (docs/experiments.md E58).
FLASHSPARK_DEVICE Keys find_keys(const SequenceArguments &a, int32_t seq) {
  Keys keys{};
  int32_t held = a.max_seqlen_k, begin = 0, room = a.key_rows;
  if (a.cu_seqlens_k != nullptr) {
    const int32_t row = clamp(a.cu_seqlens_k[seq], 0, a.key_rows);
    keys.row = row;
    held = clamp(a.cu_seqlens_k[seq + 1], row, a.key_rows) - row;
    room -= row;
  } else {
    keys.batch = a.kv_batch_index != nullptr ? clamp(a.kv_batch_index[seq], 0, a.last_batch) : seq;
  }
  if (a.seqused_k != nullptr) held = a.seqused_k[seq];
  if (a.leftpad_k != nullptr) begin = clamp(a.leftpad_k[seq], 0, room);
  keys.begin = ptx::uniform(begin);
  keys.end = ptx::uniform(clamp(held, begin, room));
  if (a.page_table != nullptr) keys.pages = a.page_table + keys.batch * a.page_table_stride;
  return keys;
}

}  // namespace flashspark
