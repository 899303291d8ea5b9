// The mask as intervals. A row keeps one interval of keys (causality, windows, chunks, length) and, under a PrefixLM
// range or R-SWA, perhaps a second one. For a set of rows two ranges follow from them:
//
//   visited     the smallest interval that holds every key some row keeps: what is copied and computed
//   unmasked    the keys that every row keeps: tiles inside it need no comparison
//
// Rows x keys of a causal window, four rows a tile; x: kept
//
//   key          0 1 2 3 4 5 6 7 8 9
//   row 4        . x x x x . . . . .
//   row 5        . . x x x x . . . .
//   row 6        . . . x x x x . . .
//   row 7        . . . . x x x x . .
//   visited        [-------------)
//   unmasked             [-)             only key 4
//
// The other direction, for kernels that own a key tile and walk over rows (dK and dV), is tokens_of_keys().
#pragma once

#include "attention/sequence.cuh"

namespace flashspark {

// The keys of a row: in order and disjoint; `second` is empty when one interval says it all.
struct RowMask {
  Interval first, second;
};

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

FLASHSPARK_DEVICE bool is_causal(const SequenceArguments &a, int32_t seq) {
  return (a.causal_per_seq != nullptr ? a.causal_per_seq[seq] : a.causal) != 0;
}

FLASHSPARK_DEVICE SequenceMask sequence_mask(const SequenceArguments &a, const RowTile &row_tile, const Keys &keys,
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

// Causality, windows and length; chunks only in kernels with score modifications, since their instructions would
// lengthen short calls of the others (docs/experiments.md E60).
template <bool has_score_mod = false>
FLASHSPARK_DEVICE Interval window_interval(const SequenceArguments &a, const SequenceMask &mask, int32_t token) {
  const int32_t pos = token + mask.shift;
  Interval x{max_of(mask.begin, pos - a.window_left), min_of(mask.end, pos + a.window_right + 1)};
  if (mask.causal) x.end = min_of(x.end, pos + 1);
  if (has_score_mod && a.attention_chunk != 0) {
    // Chunks of positions before the first key hold no key.
    const int32_t from_begin = pos - mask.begin;
    const int32_t chunk = mask.begin + quotient(max_of(from_begin, 0), a.attention_chunk) * a.attention_chunk;
    x.begin = max_of(x.begin, chunk);
    x.end = from_begin < 0 ? mask.begin : min_of(x.end, chunk + a.attention_chunk);
  }
  return x;
}

// The union of the prefix ranges that hold the token; ranges that hold the same query overlap there.
FLASHSPARK_DEVICE Interval prefix_interval(const SequenceArguments &a, const SequenceMask &mask, int32_t token) {
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
FLASHSPARK_DEVICE RowMask row_mask(const SequenceArguments &a, const SequenceMask &mask, int32_t token) {
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

// Of a set of rows, for the first and the second interval of each: the visited and the unmasked range.
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

// Over packed rows [first, end) of a sequence; the same in every lane. Ends of window intervals never fall from one
// token to the next, so that the two outermost tokens speak for all; with second intervals every token is asked.
template <bool has_score_mod>
FLASHSPARK_DEVICE KeyBounds key_bounds(const SequenceArguments &a, const SequenceMask &mask, int32_t first,
                                       int32_t end) {
  KeyBounds h = no_keys();
  const int32_t low = divide(first, a.group).quotient, high = divide(end - 1, a.group).quotient;
  if constexpr (has_score_mod) {
    for (int32_t token = low + ptx::lane(); token <= high; token += 32) add(h, row_mask<true>(a, mask, token));
    ptx::warp_barrier();
    reduce(h);
  } else {
    add(h, row_mask<false>(a, mask, low));
    add(h, row_mask<false>(a, mask, high));
    // Rows between an empty first and an empty last one may keep keys: visited is what lies between the outer ends.
    h.visited[0] = uniform({window_interval(a, mask, low).begin, window_interval(a, mask, high).end});
    h.unmasked[0] = uniform(h.unmasked[0]);
  }
  return h;
}

// The other direction: of the tokens [0, tokens) of a sequence those that may keep a key of [keys.begin, keys.end), and
// those that keep all of them. Both ends of a window interval rise with the token, so that the inverse is an interval,
// too. Under a PrefixLM range it is not: `visited` is then a superset (all tokens) and `unmasked` a subset, and a
// kernel compares with row_mask() in between.
struct TokenBounds {
  Interval visited, unmasked;
};
template <bool has_score_mod>
FLASHSPARK_DEVICE TokenBounds tokens_of_keys(const SequenceArguments &a, const SequenceMask &mask, Interval keys,
                                             int32_t tokens) {
  keys = {max_of(keys.begin, mask.begin), min_of(keys.end, mask.end)};
  if (is_empty(keys) || tokens <= 0) return {};
  // In 64 bits: an open window of 2^30 behind the last of 2^30 keys.
  const auto token_of = [&](int64_t pos) {
    const int64_t token = pos - mask.shift;
    return token < 0 ? 0 : (token < tokens ? static_cast<int32_t>(token) : tokens);
  };
  if constexpr (has_score_mod) {
    if (a.rswa_window > 0) {
      // Causal: every later token keeps the keys of the prefix, and a window of tokens the others.
      const int32_t prefix = mask.begin + clamp(a.rswa_prefix_lens[mask.seq], 0, mask.end - mask.begin);
      const auto leaves = [&](int32_t key) { return key < prefix ? tokens : token_of(int64_t{key} + a.rswa_window); };
      const int32_t visited_end = keys.begin < prefix ? tokens : leaves(keys.end - 1);
      const int32_t unmasked_end = keys.end <= prefix ? tokens : leaves(max_of(keys.begin, prefix));
      return {{token_of(keys.begin), visited_end}, {token_of(keys.end - 1), unmasked_end}};
    }
  }
  const int32_t right = mask.causal ? min_of(a.window_right, 0) : a.window_right;
  TokenBounds t{{token_of(int64_t{keys.begin} - right), token_of(int64_t{keys.end} + a.window_left)},
                {token_of(int64_t{keys.end} - 1 - right), token_of(int64_t{keys.begin} + a.window_left + 1)}};
  if constexpr (has_score_mod) {
    if (a.attention_chunk != 0) {
      // The tokens of the chunks in which the keys lie; where these are two, no token keeps all keys.
      const int32_t first = mask.begin + quotient(keys.begin - mask.begin, a.attention_chunk) * a.attention_chunk;
      const int32_t last = mask.begin + quotient(keys.end - 1 - mask.begin, a.attention_chunk) * a.attention_chunk;
      const Interval chunks{token_of(first), token_of(int64_t{last} + a.attention_chunk)};
      t.visited = {max_of(t.visited.begin, chunks.begin), min_of(t.visited.end, chunks.end)};
      t.unmasked = {max_of(t.unmasked.begin, chunks.begin), min_of(t.unmasked.end, first == last ? chunks.end : 0)};
    }
    if (a.prefix_mode != PrefixMode::none) t.visited = {0, tokens};  // a range may show any key to any token
  }
  return t;
}

// The key tiles that a CTA visits: those of the first visited range, then those of the second that are not among them.
struct KeyTiles {
  int32_t begin[2];  // tile numbers
  int32_t count[2];

  FLASHSPARK_DEVICE int32_t total() const { return count[0] + count[1]; }
  FLASHSPARK_DEVICE static bool keeps_all(int32_t) { return false; }  // but for what `visited` and `unmasked` say
  FLASHSPARK_DEVICE int32_t at(int32_t n) const { return n < count[0] ? begin[0] + n : begin[1] + n - count[0]; }
  // How many of them lie before a tile.
  template <bool has_second>
  FLASHSPARK_DEVICE int32_t before(int32_t tile) const {
    if constexpr (!has_second) return min_of(max_of(tile - begin[0], 0), total());
    return clamp(tile - begin[0], 0, count[0]) + clamp(tile - begin[1], 0, count[1]);
  }
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
