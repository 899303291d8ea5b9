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

#include "forward/stream_k.cuh"

namespace flashspark {

// A line's words: of Piece, Work, Keys and Mask, and of WorkRange where it goes on in another row tile.
// clang-format off
enum RecordField : int32_t {
  kFingerprint, kLengthsChecksum,
  kValid, kFirstKeyTile, kNumKeyTiles, kIsFinal, kPartialSlot, kHasNext,
  kSeq, kHead, kSeqlenQ, kQueryRow, kFirstRow,
  kKeysBegin, kKeysEnd, kKeysRow, kKeysBatch, kCausal,
  kRangeNext, kRangeEnd, kTileStartCost, kPrefixSeqs, kPrefixPositions, kRangeSkip,
  kRecordFields
};
// clang-format on
static_assert(kRecordFields <= kRecordWords);

// Of the lengths of all sequences.
FLASHSPARK_DEVICE int32_t lengths_checksum(const ForwardArguments &a) {
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
struct MetadataRecord {
  int32_t word;

  FLASHSPARK_DEVICE int32_t operator[](RecordField n) const { return ptx::uniform(ptx::shuffle(word, n)); }
  // Cut to [0, most] before it becomes uniform: there is no minimum in uniform registers. What is negative counts as
  // beyond.
  FLASHSPARK_DEVICE int32_t at(RecordField n, int32_t most) const {
    const auto x = static_cast<uint32_t>(ptx::shuffle(word, n));
    return ptx::uniform(static_cast<int32_t>(min_of(x, static_cast<uint32_t>(most))));
  }
  // Positions are at most 2^29 (is_decode in plan.cpp), so that sums of two fit in 31 bits.
  FLASHSPARK_DEVICE int32_t position(RecordField n) const { return at(n, 1 << 29); }
};

FLASHSPARK_DEVICE MetadataRecord read_record(const ForwardArguments &a) {
  return {ptx::load_of_device(a.scheduler_metadata + ptx::cta_x() * kRecordWords + ptx::thread_index() % 32)};
}

// Whether it was made for these arguments.
FLASHSPARK_DEVICE bool matches(const ForwardArguments &a, const MetadataRecord &record) {
  return record[kFingerprint] == a.metadata_fingerprint;
}

FLASHSPARK_DEVICE RowTile row_tile_of(const ForwardArguments &a, const MetadataRecord &record) {
  RowTile row_tile{};
  row_tile.seq = record.at(kSeq, a.num_seqs - 1);
  row_tile.head_kv = record.at(kHead, a.num_heads_kv - 1);
  row_tile.seqlen_q = record.at(kSeqlenQ, a.max_seqlen_q);
  // The host lets no sequence be longer than all of q (make_plan).
  row_tile.q_row = a.cu_seqlens_q != nullptr ? record.at(kQueryRow, a.total_q - row_tile.seqlen_q) : 0;
  row_tile.end_row = row_tile.seqlen_q * static_cast<int32_t>(a.group.value);
  row_tile.first_row = record.at(kFirstRow, row_tile.end_row);
  row_tile.valid = record[kValid] != 0 && row_tile.first_row < row_tile.end_row;
  return row_tile;
}
FLASHSPARK_DEVICE KeyTileRange key_range_of(const ForwardArguments &a, const MetadataRecord &record) {
  return {record.position(kFirstKeyTile), record.position(kNumKeyTiles), record[kIsFinal] != 0,
          record.at(kPartialSlot, 2 * a.stream_k.ctas - 1), record[kHasNext] != 0};
}
FLASHSPARK_DEVICE Keys keys_of(const ForwardArguments &a, const MetadataRecord &record) {
  Keys keys{};
  const int32_t row = a.cu_seqlens_k != nullptr ? record.at(kKeysRow, a.key_rows) : 0;
  keys.row = row;
  keys.begin = record.at(kKeysBegin, a.key_rows - row);
  keys.end = record.at(kKeysEnd, a.key_rows - row);
  keys.batch = record.at(kKeysBatch, a.last_batch);
  if (a.page_table != nullptr) keys.pages = a.page_table + keys.batch * a.page_table_stride;
  return keys;
}
FLASHSPARK_DEVICE WorkRange work_range_of(const ForwardArguments &a, const MetadataRecord &record) {
  return {record.position(kRangeNext),
          record.position(kRangeEnd),
          record.at(kTileStartCost, a.stream_k.tile_start_cost),
          {record.at(kPrefixSeqs, a.num_seqs), record.position(kPrefixPositions)},
          record.position(kRangeSkip)};
}

// One warp, block x, writes the line of block x of the forward kernel.
FLASHSPARK_DEVICE void write_scheduler_metadata(const ForwardArguments &a) {
  ptx::grid_dependency_wait();
  RowTile row_tile{};  // where nothing is found a line has numbers, too
  WorkRange range{};
  const KeyTileRange keys_of_tile = find_key_range(a, a.tile_rows, a.tile_keys, true, range, row_tile);
  const Keys keys = row_tile.valid ? find_keys(a, row_tile.seq) : Keys{};
  const int32_t lengths = lengths_checksum(a), lane = static_cast<int32_t>(ptx::thread_index() % 32);
  int32_t word = 0;
  const auto put = [&word, lane](RecordField n, int64_t value) {
    if (lane == n) word = static_cast<int32_t>(value);
  };
  put(kFingerprint, a.metadata_fingerprint);
  put(kLengthsChecksum, lengths);
  put(kValid, row_tile.valid);
  put(kFirstKeyTile, keys_of_tile.first);
  put(kNumKeyTiles, keys_of_tile.count);
  put(kIsFinal, keys_of_tile.is_final);
  put(kPartialSlot, keys_of_tile.partial_slot);
  put(kHasNext, keys_of_tile.has_next);
  put(kSeq, row_tile.seq);
  put(kHead, row_tile.head_kv);
  put(kSeqlenQ, row_tile.seqlen_q);
  put(kQueryRow, row_tile.q_row);
  put(kFirstRow, row_tile.first_row);
  put(kKeysBegin, keys.begin);
  put(kKeysEnd, keys.end);
  put(kKeysRow, keys.row);
  put(kKeysBatch, keys.batch);
  put(kCausal, row_tile.valid && is_causal(a, row_tile.seq));
  put(kRangeNext, range.next);
  put(kRangeEnd, range.end);
  put(kTileStartCost, range.tile_start_cost);
  put(kPrefixSeqs, range.prefix.seqs);
  put(kPrefixPositions, range.prefix.positions);
  put(kRangeSkip, range.skip);
  a.scheduler_metadata[ptx::cta_x() * kRecordWords + lane] = word;
  ptx::fence();
}

}  // namespace flashspark
