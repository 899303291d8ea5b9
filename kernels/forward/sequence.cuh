// Which rows and keys a block works on. Metadata is read for sequences that have query rows, and for nothing else:
// padded rows of a captured batch carry stale lengths and page numbers.
#pragma once

#include "forward/arguments.hpp"
#include "ptx/ptx.cuh"

namespace flashspark {

FLASHSPARK_DEVICE int32_t min_of(int32_t a, int32_t b) {
  return a < b ? a : b;
}
FLASHSPARK_DEVICE int32_t max_of(int32_t a, int32_t b) {
  return a > b ? a : b;
}
FLASHSPARK_DEVICE uint32_t min_of(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}
FLASHSPARK_DEVICE int32_t ceil_div(int32_t a, int32_t b) {
  return (a + b - 1) / b;
}
// a / b for a >= 0 and b > 0, in fewer instructions than a division with signs.
FLASHSPARK_DEVICE int32_t quotient(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

struct Quotient {
  int32_t quotient, remainder;
};
FLASHSPARK_DEVICE Quotient divide(int32_t n, const Divisor &d) {
  const uint32_t q = d.multiplier == 0 ? static_cast<uint32_t>(n) >> d.shift
                                       : ptx::multiply_high(static_cast<uint32_t>(n), d.multiplier) >> d.shift;
  return {static_cast<int32_t>(q), n - static_cast<int32_t>(q * d.value)};
}

FLASHSPARK_DEVICE int32_t clamp(int32_t x, int32_t low, int32_t high) {
  return max_of(low, min_of(x, high));
}

struct RowTile {
  bool valid;   // false: a surplus block
  int32_t seq;  // b
  int32_t head_kv;
  int32_t seqlen_q;   // query tokens in use
  int32_t q_row;      // varlen: first token row in q and out; dense: 0
  int32_t first_row;  // of the tile, in packed rows
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
FLASHSPARK_DEVICE QueryLengths read_query_lengths(const ForwardArguments &a, int32_t seq) {
  return {read_length(a.cu_seqlens_q, seq), read_length(a.cu_seqlens_q, seq + 1), read_length(a.seqused_q, seq)};
}
FLASHSPARK_DEVICE KeyLengths read_key_lengths(const ForwardArguments &a, int32_t seq) {
  return {read_length(a.cu_seqlens_k, seq), read_length(a.cu_seqlens_k, seq + 1), read_length(a.seqused_k, seq),
          read_length(a.leftpad_k, seq)};
}

// The query rows of a sequence that are in use.
struct SequenceRows {
  int32_t row;  // varlen: of the first token in q and out; dense: 0
  int32_t tokens;
};
// Nothing that memory says leads outside q and out, or beyond max_seqlen_q, which grids and scratch memory count on.
FLASHSPARK_DEVICE SequenceRows queries_of(const ForwardArguments &a, const QueryLengths &x) {
  SequenceRows q{0, a.max_seqlen_q};
  if (a.cu_seqlens_q != nullptr) {
    q.row = clamp(x.begin, 0, a.total_q);
    q.tokens = min_of(a.max_seqlen_q, clamp(x.end, q.row, a.total_q) - q.row);
  }
  if (a.seqused_q != nullptr) q.tokens = clamp(x.used, 0, q.tokens);
  return q;
}

// Of this lane's number and those of the lanes before it.
FLASHSPARK_DEVICE int32_t prefix_sum(int32_t x) {
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  FLASHSPARK_UNROLL
  for (uint32_t delta = 1; delta < 32; delta *= 2) {
    const int32_t other = ptx::shuffle_up(x, delta);
    if (lane >= static_cast<int32_t>(delta)) x += other;
  }
  return x;
}

// Varlen: walks the sequences from the last to the first, 32 at a time, until `rank` tiles are passed. Tiles of a
// sequence also count from the last, so the rows that see most keys start first.
FLASHSPARK_DEVICE RowTile varlen_row_tile(const ForwardArguments &a, int32_t rank, int32_t rows) {
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  RowTile row_tile{};
  for (int32_t base = a.num_seqs - 1; base >= 0; base -= 32) {
    const int32_t b = base - lane;
    SequenceRows q{};
    if (b >= 0) q = queries_of(a, read_query_lengths(a, b));
    // Tiles of this lane's sequence and of those before it.
    const int32_t passed = prefix_sum(ceil_div(q.tokens * static_cast<int32_t>(a.group.value), rows));
    const uint32_t beyond = ptx::ballot(passed > rank);
    if (beyond == 0) {
      rank -= ptx::shuffle(passed, 31);
      continue;
    }
    const uint32_t winner = ptx::lowest_bit(beyond);
    row_tile.seq = ptx::uniform(base - static_cast<int32_t>(winner));
    row_tile.seqlen_q = ptx::uniform(ptx::shuffle(q.tokens, winner));
    row_tile.q_row = ptx::uniform(ptx::shuffle(q.row, winner));
    row_tile.first_row = ptx::uniform((ptx::shuffle(passed, winner) - 1 - rank) * rows);
    row_tile.valid = row_tile.first_row >= 0;  // offsets that overlap by far may have more tiles than 31 bits count
    return row_tile;
  }
  return row_tile;
}

// What a block learns from the arguments alone, before the kernel ahead of it in the stream has ended.
struct GridCoordinate {
  int32_t seq, head_kv;  // with cu_seqlens_q units are KV heads, and the sequence is found from `rank`
  int32_t rank;          // of the tile among those of its unit
};
FLASHSPARK_DEVICE GridCoordinate grid_coordinate(const ForwardArguments &a) {
  const int32_t block = static_cast<int32_t>(ptx::cta_x());
  const int32_t section = block / (a.num_m_blocks * a.l2_section_heads);
  const int32_t first_unit = section * a.l2_section_heads;
  const int32_t units = min_of(a.l2_section_heads, a.num_heads_times_batch - first_unit);
  const int32_t inside = block - section * a.num_m_blocks * a.l2_section_heads;
  const int32_t rank = inside / units;
  const int32_t unit = first_unit + inside - rank * units;
  const int32_t seq = unit / a.num_heads_kv;
  return {ptx::uniform(seq), ptx::uniform(unit - seq * a.num_heads_kv), ptx::uniform(rank)};
}

// True: some word of the arguments is not 0. Reads one of each 64 bytes, a line of the constant cache: a line that is
// met for the first time in the middle of a chain of dependent work puts its miss into that chain.
FLASHSPARK_DEVICE bool warm_constant_cache(const ForwardArguments &a) {
  uint32_t some = 0;
  FLASHSPARK_UNROLL
  for (uint32_t at = 0; at < sizeof a; at += 64) {
    uint32_t word;
    __builtin_memcpy(&word, reinterpret_cast<const char *>(&a) + at, sizeof word);
    some |= word;
  }
  return some != 0;
}

// The tile of the block; `rows` packed rows a tile.
FLASHSPARK_DEVICE RowTile single_tile(const ForwardArguments &a, GridCoordinate coordinate, int32_t rows) {
  RowTile row_tile{};
  if (a.cu_seqlens_q != nullptr) {
    row_tile = varlen_row_tile(a, coordinate.rank, rows);
  } else {
    row_tile.seq = coordinate.seq;
    row_tile.seqlen_q = a.max_seqlen_q;
    if (a.seqused_q != nullptr) row_tile.seqlen_q = clamp(a.seqused_q[row_tile.seq], 0, a.max_seqlen_q);
    row_tile.first_row = (a.num_m_blocks - 1 - coordinate.rank) * rows;
    row_tile.valid = row_tile.first_row < row_tile.seqlen_q * static_cast<int32_t>(a.group.value);
  }
  row_tile.head_kv = coordinate.head_kv;
  row_tile.end_row = row_tile.seqlen_q * static_cast<int32_t>(a.group.value);
  return row_tile;
}

// A factor of the work's sequence and KV head.
FLASHSPARK_DEVICE float scale_of(const Scale &scale, const RowTile &row_tile) {
  return scale.data == nullptr ? 1.0f
                               : scale.data[row_tile.seq * scale.seq_stride + row_tile.head_kv * scale.head_stride];
}

// The keys of a sequence, counted in rows of its cache: left padding comes first, so that a key's page follows from its
// number alone and a tile of keys begins where a page may.
struct Keys {
  int32_t begin, end;    // keys in use
  int64_t row;           // varlen: row of k and v where the sequence begins
  int64_t batch;         // dense: which sequence of the cache
  const int32_t *pages;  // this sequence's row of the page table
};

// What the lengths say, which may be of another sequence in every lane; nothing of it leads outside k and v.
FLASHSPARK_DEVICE Keys keys_of(const ForwardArguments &a, const KeyLengths &x) {
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

// The same of one sequence, and where its pages are. Written out: with keys_of() here, or the page table looked at
// before the rest, ptxas spills 108 bytes of d64_prefill and 60 of d128_prefill, which cost a tenth of their speed.
FLASHSPARK_DEVICE Keys find_keys(const ForwardArguments &a, int32_t seq) {
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
