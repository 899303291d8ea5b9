// The mask as intervals of keys. A row keeps one interval (causality, windows, length) and, in instances of kind
// with a score modification, perhaps a second one (a PrefixLM range, the prefix of R-SWA). From them: which tiles of
// keys a block visits, which keys it may read, and which tiles need no mask.
#pragma once

#include "forward/sequence.cuh"

namespace flashspark {

struct Interval {
  int32_t begin, end;  // [begin, end); empty when begin >= end
};

// Intervals in order and disjoint; `second` is empty when one says it all.
struct RowMask {
  Interval first, second;
};

FLASHSPARK_DEVICE bool is_empty(Interval x) {
  return x.begin >= x.end;
}

FLASHSPARK_DEVICE RowMask join(Interval a, Interval b) {
  if (is_empty(b)) return {a, {0, 0}};
  if (is_empty(a)) return {b, {0, 0}};
  if (b.begin < a.begin) {
    const Interval c = a;
    a = b;
    b = c;
  }
  if (b.begin > a.end) return {a, b};
  return {{a.begin, max_of(a.end, b.end)}, {0, 0}};
}

// What the rows of a sequence share. Positions count rows of the cache, as keys do.
struct SequenceMask {
  int32_t seq;
  int32_t begin, end;  // keys in use
  int32_t shift;       // pos = token + shift (bottom-right alignment)
  bool causal;
  int64_t token_row;  // row of token 0 in the tables by token (rel_logits, prefix_ranges)
};

FLASHSPARK_DEVICE bool is_causal(const ForwardArguments &a, int32_t seq) {
  return (a.causal_per_seq != nullptr ? a.causal_per_seq[seq] : a.causal) != 0;
}

FLASHSPARK_DEVICE SequenceMask sequence_mask(const ForwardArguments &a, const RowTile &row_tile, const Keys &keys,
                                             bool causal) {
  SequenceMask mask{};
  mask.seq = row_tile.seq;
  mask.begin = keys.begin;
  mask.end = keys.end;
  mask.shift = keys.end - row_tile.seqlen_q;
  mask.causal = causal;
  mask.token_row = a.cu_seqlens_q != nullptr ? row_tile.q_row : static_cast<int64_t>(row_tile.seq) * a.max_seqlen_q;
  return mask;
}

// Chunks are for instances of kind with a score modification: in all of them they would cost short sequences their
// instructions' way.
template <bool has_score_mod = false>
FLASHSPARK_DEVICE Interval window_interval(const ForwardArguments &a, const SequenceMask &mask, int32_t token) {
  const int32_t pos = token + mask.shift;
  Interval x{max_of(mask.begin, pos - a.window_left), min_of(mask.end, pos + a.window_right + 1)};
  if (mask.causal) x.end = min_of(x.end, pos + 1);
  if (has_score_mod && a.attention_chunk != 0) {
    // The chunks of positions before the first key hold no key.
    const int32_t from_begin = pos - mask.begin;
    const int32_t chunk = mask.begin + quotient(max_of(from_begin, 0), a.attention_chunk) * a.attention_chunk;
    x.begin = max_of(x.begin, chunk);
    x.end = from_begin < 0 ? mask.begin : min_of(x.end, chunk + a.attention_chunk);
  }
  return x;
}

// The union of the prefix ranges that hold the token; ranges that hold the same query overlap there.
FLASHSPARK_DEVICE Interval prefix_interval(const ForwardArguments &a, const SequenceMask &mask, int32_t token) {
  const int32_t pos = token + mask.shift, pos_in_range = pos - mask.begin;
  Interval x{INT32_MAX, 0};
  if (a.prefix_mode == PrefixMode::per_token) {
    const int32_t *range = a.prefix_ranges + 2 * (mask.token_row + token);
    x = {range[0], min_of(range[1], INT32_MAX - 1) + 1};
  } else {
    const int32_t *range = a.prefix_ranges + 2 * static_cast<int64_t>(mask.seq) * a.num_prefix_ranges;
    for (int32_t n = 0; n < a.num_prefix_ranges; ++n, range += 2) {
      if (pos_in_range < range[0] || pos_in_range > range[1]) continue;
      x = {min_of(x.begin, range[0]), max_of(x.end, min_of(range[1], INT32_MAX - 1) + 1)};
    }
  }
  if (x.begin >= x.end) return {0, 0};
  const int32_t keys = mask.end - mask.begin;
  x = {clamp(x.begin, 0, keys) + mask.begin, min_of(x.end, keys) + mask.begin};
  if (a.prefix_clamp_window) x.begin = max_of(x.begin, pos - a.window_left);
  return x;
}

template <bool has_score_mod>
FLASHSPARK_DEVICE RowMask row_mask(const ForwardArguments &a, const SequenceMask &mask, int32_t token) {
  if constexpr (has_score_mod) {
    if (a.rswa_window > 0) {
      const int32_t pos = token + mask.shift;
      const int32_t end = min_of(pos + 1, mask.end);
      const int32_t prefix = clamp(a.rswa_prefix_lens[mask.seq], 0, mask.end - mask.begin);
      return join({mask.begin, min_of(mask.begin + prefix, end)}, {max_of(mask.begin, pos - a.rswa_window + 1), end});
    }
    if (a.prefix_mode != PrefixMode::none)
      return join(window_interval<true>(a, mask, token), prefix_interval(a, mask, token));
  }
  return {window_interval<has_score_mod>(a, mask, token), {0, 0}};
}

// Of a set of rows, for the first and the second interval of each: the hull (smallest interval that holds all of them)
// and the core (keys that every row keeps).
struct KeyBounds {
  Interval visited[2], unmasked[2];
};

FLASHSPARK_DEVICE KeyBounds no_keys() {
  return {{{INT32_MAX, 0}, {INT32_MAX, 0}}, {{0, INT32_MAX}, {0, INT32_MAX}}};
}
FLASHSPARK_DEVICE void add(KeyBounds &h, const RowMask &row) {
  const Interval both[2] = {row.first, row.second};
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 2; ++n) {
    if (!is_empty(both[n]))
      h.visited[n] = {min_of(h.visited[n].begin, both[n].begin), max_of(h.visited[n].end, both[n].end)};
    h.unmasked[n] = {max_of(h.unmasked[n].begin, both[n].begin), min_of(h.unmasked[n].end, both[n].end)};
  }
}
FLASHSPARK_DEVICE void reduce(KeyBounds &h) {
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 2; ++n) {
    h.visited[n] = {ptx::reduce_min(h.visited[n].begin), ptx::reduce_max(h.visited[n].end)};
    h.unmasked[n] = {ptx::reduce_max(h.unmasked[n].begin), ptx::reduce_min(h.unmasked[n].end)};
  }
}

FLASHSPARK_DEVICE Interval uniform(Interval x) {
  return {ptx::uniform(x.begin), ptx::uniform(x.end)};
}

// Over rows [first, end) of a sequence; the same in every lane. Ends of single intervals never fall from one token to
// the next, so the two outermost tokens speak for all; with second intervals every token is asked.
template <bool has_score_mod>
FLASHSPARK_DEVICE KeyBounds key_bounds(const ForwardArguments &a, const SequenceMask &mask, int32_t first,
                                       int32_t end) {
  KeyBounds h = no_keys();
  const int32_t low = divide(first, a.group).quotient, high = divide(end - 1, a.group).quotient;
  if constexpr (has_score_mod) {
    for (int32_t token = low + static_cast<int32_t>(ptx::thread_index() % 32); token <= high; token += 32)
      add(h, row_mask<true>(a, mask, token));
    ptx::warp_barrier();
    reduce(h);
  } else {
    add(h, row_mask<false>(a, mask, low));
    add(h, row_mask<false>(a, mask, high));
    // Rows between an empty first and an empty last one may keep keys: the hull is what lies between the ends.
    h.visited[0] = uniform({window_interval(a, mask, low).begin, window_interval(a, mask, high).end});
    h.unmasked[0] = uniform(h.unmasked[0]);
  }
  return h;
}

// The tiles of keys that a block visits: those of the first hull, then those of the second that are not among them.
struct KeyTiles {
  int32_t begin[2];  // tile numbers
  int32_t count[2];

  FLASHSPARK_DEVICE int32_t total() const { return count[0] + count[1]; }
  FLASHSPARK_DEVICE int32_t at(int32_t n) const { return n < count[0] ? begin[0] + n : begin[1] + n - count[0]; }
};

template <int32_t keys>
FLASHSPARK_DEVICE KeyTiles key_tiles(const KeyBounds &h) {
  KeyTiles tiles{};
  int32_t next = 0;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 2; ++n) {
    if (is_empty(h.visited[n])) continue;
    tiles.begin[n] = max_of(next, h.visited[n].begin / keys);
    tiles.count[n] = max_of(0, ceil_div(h.visited[n].end, keys) - tiles.begin[n]);
    next = max_of(next, tiles.begin[n] + tiles.count[n]);
  }
  return tiles;
}

}  // namespace flashspark
