// Shares found once for many calls. The layers of a model attend to sequences of the same lengths, and each would find
// the same shares from them: a round trip to memory and half a microsecond of arithmetic, behind the wait for the
// kernel ahead. The schedule kernel writes down what each block of the forward kernel would find, a line of 128 bytes;
// a block reads its line before the wait, and works out masks and addresses there, too.
//
// A line is believed only where it is true: `key` says for which arguments it was made, and `lengths` sums up what it
// was made from, which every block reads again behind the wait, beside its first page numbers. Where either differs
// blocks find their shares themselves; all of them do, since all see the same. Since the caller holds the lines, a word
// of one may be anything even then: every number is cut to what there is before it becomes an address.
//
// A line may be read before the wait, since nothing behind the schedule kernel in its stream starts before that has
// ended: it lets no kernel begin early (grid_dependency_launch), and what it wrote is at the device's L2 by then.
#pragma once

#include "forward/shares.cuh"

namespace flashspark {

// A line's words: of Piece, Work, Keys and Mask, and of Share where it goes on in another row tile.
// clang-format off
enum ScheduleWord : int32_t {
  kKey, kLengths,
  kFound, kFirst, kCount, kWhole, kPlace, kMore,
  kSeq, kHead, kTokens, kQueryRow, kFirstRow,
  kKeysBegin, kKeysEnd, kKeysRow, kKeysBatch, kCausal,
  kShareAt, kShareEnd, kShareStart, kPassedSeqs, kPassedPositions, kShareSkip,
  kScheduleFields
};
// clang-format on
static_assert(kScheduleFields <= kScheduleWords);

// Of the lengths of all sequences.
FLASHSPARK_DEVICE int32_t sum_of_lengths(const ForwardArguments &a) {
  uint32_t sum = 0;
  for (int32_t first = 0; first < a.num_seqs; first += 32) {
    const int32_t seq = first + static_cast<int32_t>(ptx::thread_index() % 32);
    if (seq >= a.num_seqs) break;
    const QueryLengths q = read_query_lengths(a, seq);
    const KeyLengths k = read_key_lengths(a, seq);
    const int32_t all[] = {q.begin,
                           q.end,
                           k.begin,
                           k.end,
                           q.used,
                           k.used,
                           k.pad,
                           read_length(a.causal_per_seq, seq),
                           read_length(a.kv_batch_index, seq)};
    auto mixed = static_cast<uint32_t>(seq);
    FLASHSPARK_UNROLL
    for (const int32_t each : all) {
      mixed = (mixed ^ static_cast<uint32_t>(each)) * 0x9e3779b1u;  // an odd number near 2^32 / the golden ratio
      mixed ^= mixed >> 15;
    }
    sum += mixed;
  }
  ptx::warp_barrier();
  return static_cast<int32_t>(ptx::reduce_add(sum));
}

// A block's line: a word a lane.
struct Line {
  int32_t word;

  FLASHSPARK_DEVICE int32_t operator[](ScheduleWord n) const { return ptx::uniform(ptx::shuffle(word, n)); }
  // Cut to [0, most] before it becomes uniform: there is no minimum in uniform registers. What is negative counts as
  // beyond.
  FLASHSPARK_DEVICE int32_t at(ScheduleWord n, int32_t most) const {
    const auto x = static_cast<uint32_t>(ptx::shuffle(word, n));
    return ptx::uniform(static_cast<int32_t>(min_of(x, static_cast<uint32_t>(most))));
  }
  // Positions are at most 2^29 (is_decode in plan.cpp), so that sums of two fit in 31 bits.
  FLASHSPARK_DEVICE int32_t position(ScheduleWord n) const { return at(n, 1 << 29); }
};

FLASHSPARK_DEVICE Line read_line(const ForwardArguments &a) {
  return {ptx::load_of_device(a.schedule + ptx::block_x() * kScheduleWords + ptx::thread_index() % 32)};
}

// Whether it was made for these arguments.
FLASHSPARK_DEVICE bool is_of(const ForwardArguments &a, const Line &line) {
  return line[kKey] == a.schedule_key;
}

FLASHSPARK_DEVICE Work work_of(const ForwardArguments &a, const Line &line) {
  Work work{};
  work.seq = line.at(kSeq, a.num_seqs - 1);
  work.head_kv = line.at(kHead, a.num_heads_kv - 1);
  work.seqlen_q = line.at(kTokens, a.max_seqlen_q);
  // The host lets no sequence be longer than all of q (make_plan).
  work.q_row = a.cu_seqlens_q != nullptr ? line.at(kQueryRow, a.total_q - work.seqlen_q) : 0;
  work.end_row = work.seqlen_q * static_cast<int32_t>(a.group.value);
  work.first_row = line.at(kFirstRow, work.end_row);
  work.found = line[kFound] != 0 && work.first_row < work.end_row;
  return work;
}
FLASHSPARK_DEVICE Piece piece_of(const ForwardArguments &a, const Line &line) {
  return {line.position(kFirst), line.position(kCount), line[kWhole] != 0,
          line.at(kPlace, 2 * a.share_limits.shares - 1), line[kMore] != 0};
}
FLASHSPARK_DEVICE Keys keys_of(const ForwardArguments &a, const Line &line) {
  Keys keys{};
  const int32_t row = a.cu_seqlens_k != nullptr ? line.at(kKeysRow, a.key_rows) : 0;
  keys.row = row;
  keys.begin = line.at(kKeysBegin, a.key_rows - row);
  keys.end = line.at(kKeysEnd, a.key_rows - row);
  keys.batch = line.at(kKeysBatch, a.last_batch);
  if (a.page_table != nullptr) keys.pages = a.page_table + keys.batch * a.page_table_stride;
  return keys;
}
FLASHSPARK_DEVICE Share share_of(const ForwardArguments &a, const Line &line) {
  return {line.position(kShareAt),
          line.position(kShareEnd),
          line.at(kShareStart, a.share_limits.start),
          {line.at(kPassedSeqs, a.num_seqs), line.position(kPassedPositions)},
          line.position(kShareSkip)};
}

// One warp, block x, writes the line of block x of the forward kernel.
FLASHSPARK_DEVICE void schedule(const ForwardArguments &a) {
  ptx::grid_dependency_wait();
  Work work{};  // where nothing is found a line has numbers, too
  Share share{};
  const Piece piece = find_piece(a, a.tile_rows, a.tile_keys, true, share, work);
  const Keys keys = work.found ? find_keys(a, work.seq) : Keys{};
  const int32_t lengths = sum_of_lengths(a), lane = static_cast<int32_t>(ptx::thread_index() % 32);
  int32_t word = 0;
  const auto put = [&word, lane](ScheduleWord n, int64_t value) {
    if (lane == n) word = static_cast<int32_t>(value);
  };
  put(kKey, a.schedule_key);
  put(kLengths, lengths);
  put(kFound, work.found);
  put(kFirst, piece.first);
  put(kCount, piece.count);
  put(kWhole, piece.whole);
  put(kPlace, piece.place);
  put(kMore, piece.more);
  put(kSeq, work.seq);
  put(kHead, work.head_kv);
  put(kTokens, work.seqlen_q);
  put(kQueryRow, work.q_row);
  put(kFirstRow, work.first_row);
  put(kKeysBegin, keys.begin);
  put(kKeysEnd, keys.end);
  put(kKeysRow, keys.row);
  put(kKeysBatch, keys.batch);
  put(kCausal, work.found && is_causal(a, work.seq));
  put(kShareAt, share.at);
  put(kShareEnd, share.end);
  put(kShareStart, share.start);
  put(kPassedSeqs, share.passed.seqs);
  put(kPassedPositions, share.passed.positions);
  put(kShareSkip, share.skip);
  a.schedule[ptx::block_x() * kScheduleWords + lane] = word;
  ptx::fence();
}

}  // namespace flashspark
