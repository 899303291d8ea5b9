// Small grids in turns: dq has two sums, and a CTA walks over rows so that hardly any waits for its turn, while all
// begin together and have about as much to do. CTAs add to either sum in the order of their launch.
//
// Without a mask a CTA has a tile of keys, of all query heads of a group or some, or some of the rows. It begins a head
// with other rows than the CTAs of other tiles, some turns behind those of the tile after it, and goes on with the
// first rows behind the last ones: these it adds to the second sum, and others to the first one.
//
// With a causal mask two tiles are a walk, one of the first half and its mirror image, so that all walks are equally
// long: first all heads of the one tile, which it adds to the first sum, then those of the other one, to the second
// sum, back and forth, one head downwards and one upwards. A walk is cut into equal parts, of a CTA each; those of the
// last part begin before the others. Wherever CTAs add to the same rows of a head and sum, the one with the later part
// comes first, and of the same part that of the later walk, which is there a turn or two earlier.
#pragma once

#include "backward/pieces.cuh"

namespace flashspark {

template <class T>
struct Walks {
  static constexpr int32_t kTurnBlocks = kWalkTurnBlocks;
  static constexpr int32_t kTileTurns = T::kKeys / (T::kRows * kTurnBlocks);
  const BackwardArguments &a;

  struct Place {
    int32_t head;               // a KV head, of all sequences
    int32_t heads, part, walk;  // numbers of the part of its query heads, and so on
  };
  FLASHSPARK_DEVICE int32_t heads_parts() const { return quotient(static_cast<int32_t>(a.group.value), a.walk_heads); }
  FLASHSPARK_DEVICE int32_t cta_of(const Place &p) const {
    return ((p.head * heads_parts() + p.heads) * a.walk_parts + a.walk_parts - 1 - p.part) * a.num_walks + a.num_walks -
           1 - p.walk;
  }
  FLASHSPARK_DEVICE Place place() const {
    const Quotient walk = split(static_cast<int32_t>(ptx::cta_x()), a.num_walks),
                   part = split(walk.quotient, a.walk_parts), heads = split(part.quotient, heads_parts());
    return {ptx::uniform(heads.quotient), ptx::uniform(heads.remainder),
            ptx::uniform(a.walk_parts - 1 - part.remainder), ptx::uniform(a.num_walks - 1 - walk.remainder)};
  }

  FLASHSPARK_DEVICE bool has_pairs() const { return a.causal != 0; }
  FLASHSPARK_DEVICE int32_t turns() const { return a.seq_row_blocks / kTurnBlocks; }
  // Of a head of a tile.
  FLASHSPARK_DEVICE int32_t length(int32_t tile) const { return turns() - tile * kTileTurns; }
  FLASHSPARK_DEVICE int32_t mirrored(int32_t walk) const { return a.num_key_tiles - 1 - walk; }
  // Of a pair: turns before a part.
  FLASHSPARK_DEVICE int32_t pair_length() const {
    return a.walk_heads * (2 * turns() - (a.num_key_tiles - 1) * kTileTurns);
  }
  FLASHSPARK_DEVICE int32_t cut(int32_t part) const { return quotient(part * pair_length(), a.walk_parts); }

  // Turns [begin, end) of a part within the first tile of a walk, or the second one.
  FLASHSPARK_DEVICE Interval part_of_tile(int32_t walk, int32_t part, bool second) const {
    const int32_t begin = cut(part), end = cut(part + 1), first = a.walk_heads * length(walk);
    if (!second) return {begin, min_of(end, first)};
    if (mirrored(walk) == walk) return {0, 0};
    return {max_of(begin - first, 0), end - first};
  }

  // The CTA's first piece, or the one behind it, where rest says that there is one.
  FLASHSPARK_DEVICE Piece find_piece(int32_t rest) const {
    const Place at = place();
    Piece p{};
    bool second = rest != INT32_MAX;
    Interval within{0, 0};
    if (has_pairs()) {
      within = part_of_tile(at.walk, at.part, second);
      if (!second && within.begin >= within.end) second = true, within = part_of_tile(at.walk, at.part, true);
      if (within.begin >= within.end) return p;
      const Interval other = part_of_tile(at.walk, at.part, true);
      p.rest = !second && other.begin < other.end ? 0 : -1;
    } else {
      const Interval rows = turns_of_part(a, at.part);
      within = {0, (rows.end - rows.begin) * a.walk_heads};
      p.rest = -1;
    }
    p.tile = dense_key_tile(a, at.head, second ? mirrored(at.walk) : at.walk);
    p.tile.num_heads_q = a.walk_heads;
    p.tile.head_q += at.heads * a.walk_heads;
    p.tile.number = p.tile.head_q;
    p.first = within.begin * kTurnBlocks, p.end = within.end * kTurnBlocks;
    p.is_second = second;
    p.ends_tile = at.heads == heads_parts() - 1 && (has_pairs() ? within.begin == 0 : at.part == 0);
    return p;
  }

  FLASHSPARK_DEVICE Interval blocks(Interval of_tile) const {
    if (has_pairs()) return of_tile;
    const Interval rows = turns_of_part(a, place().part);
    return {rows.begin * kTurnBlocks, rows.end * kTurnBlocks};
  }
  FLASHSPARK_DEVICE bool is_downwards(int32_t head, bool second) const {
    return (head + (second ? a.walk_heads : 0)) % 2 != 0;
  }
  // blocks: of a head, that the piece visits.
  FLASHSPARK_DEVICE TurnWalk first_block(const Piece &p, Interval blocks) const {
    if (!has_pairs()) {
      const int32_t origin = blocks.begin + place().walk * turn_shift(a) * kTurnBlocks;
      return {{blocks.begin, blocks.end, p.tile.head_q, origin}, origin, 1, false};
    }
    const Quotient passed = split(p.first, blocks.end - blocks.begin);
    const int32_t head = ptx::uniform(passed.quotient), within = ptx::uniform(passed.remainder);
    const bool down = is_downwards(head, p.is_second);
    return {{blocks.begin, blocks.end, p.tile.head_q + head, down ? blocks.end - 1 - within : blocks.begin + within},
            blocks.begin,
            down ? -1 : 1,
            true};
  }

  // A turn of a piece, its n-th one.
  struct Turn {
    int32_t head, number;  // of the part's heads; of a head's turns
    bool second;           // it is of the second sum
    bool down;
  };
  FLASHSPARK_DEVICE Turn turn_of(const Piece &p, int32_t walk, const Interval &blocks, int32_t n) const {
    const int32_t begin = blocks.begin / kTurnBlocks, end = blocks.end / kTurnBlocks;
    const Quotient at = split(p.first / kTurnBlocks + n, end - begin);
    if (has_pairs()) {
      const bool down = is_downwards(at.quotient, p.is_second);
      return {at.quotient, down ? end - 1 - at.remainder : begin + at.remainder, p.is_second, down};
    }
    const int32_t origin = begin + walk * turn_shift(a), number = origin + at.remainder;
    return {at.quotient, number < end ? number : number - (end - begin), number >= end, false};
  }
  // Which part of another walk of pairs has a turn.
  FLASHSPARK_DEVICE int32_t part_of(int32_t walk, const Turn &turn) const {
    const int32_t own = length(walk), other = length(mirrored(walk)), tile = turn.second ? mirrored(walk) : walk;
    const int32_t of_head = turn.second ? a.walk_heads * own + turn.head * other : turn.head * own;
    const int32_t position =
        of_head + (is_downwards(turn.head, turn.second) ? turns() - 1 - turn.number : turn.number - tile * kTileTurns);
    return quotient((position + 1) * a.walk_parts - 1, pair_length());
  }
  // How many CTAs add to a turn's rows before this one, in the same sum, and whether none does after it.
  struct Order {
    int32_t before;
    bool is_last;
  };
  FLASHSPARK_DEVICE Order order_of(int32_t walk, const Interval &blocks, const Turn &turn) const {
    const int32_t last = a.num_key_tiles - 1;
    if (!has_pairs()) {
      const int32_t first = min_of(last, quotient(turn.number - blocks.begin / kTurnBlocks, turn_shift(a)));
      return turn.second ? Order{last - walk, walk == first + 1} : Order{first - walk, walk == 0};
    }
    const int32_t seen = turn.number / kTileTurns, own = part_of(walk, turn);
    const int32_t begin = turn.second ? max_of(0, last - seen) : 0,
                  end = turn.second ? a.num_key_tiles / 2 : min_of(a.num_walks, seen + 1);
    int32_t before = 0;
    FLASHSPARK_NO_UNROLL
    for (int32_t n = begin; n < end; ++n) {
      const int32_t part = part_of(n, turn);
      before += part > own || (part == own && n > walk);
    }
    return {before, before + 1 == end - begin};
  }

  // Of what the CTA leaves, or another one has left. The last ones of each KV head leave nothing.
  FLASHSPARK_DEVICE bool leaves_sums(const Place &p) const { return p.part > 0 || p.heads < heads_parts() - 1; }
  FLASHSPARK_DEVICE int32_t slot(const Place &p, bool second) const {
    const int32_t n = cta_of(p) - p.head * a.num_walks;
    return has_pairs() && heads_parts() > 1 ? 2 * n + second : n;
  }
  // Adds what the other CTAs of the piece's tile have left, all of which were launched before.
  FLASHSPARK_DEVICE void join(const Piece &p, KeyGradient<T, T::kHeadDim> &dk, KeyGradient<T, T::kHeadDimV> &dv) const {
    const Place own = place();
    const PieceSums<T> sums{a};
    const bool second = p.is_second;
    FLASHSPARK_NO_UNROLL
    for (int32_t n = 0; n < heads_parts() * a.walk_parts; ++n) {
      const Quotient at = split(n, a.walk_parts);
      const Place other{own.head, at.quotient, a.walk_parts - 1 - at.remainder, own.walk};
      if (other.heads == own.heads && other.part == own.part) return;
      if (has_pairs()) {
        const Interval has = part_of_tile(other.walk, other.part, second);
        if (has.begin >= has.end) continue;
      }
      sums.add(slot(other, second), dk, dv);
    }
  }
};

}  // namespace flashspark
