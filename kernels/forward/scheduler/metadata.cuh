// Scheduler metadata: Stream-K ranges found once for many calls. The layers of a model attend to sequences of the same
// lengths, and each would find the same ranges again, behind the wait for the previous kernel (docs/experiments.md
// E40). The schedule kernel writes a record of 128 bytes for every CTA of the forward kernel; a CTA reads its record
// before the wait, and computes masks and addresses there, too.
//
// Metadata is a hint and never changes a result. A record names the arguments that it was made for (kFingerprint) and
// sums up the lengths that it was made from (kLengthsChecksum); every CTA sums them up again behind the wait, beside
// its first page numbers. Where either differs, CTAs find their ranges themselves; all of them do, since all see the
// same. The caller owns the memory of the records, so that a word may hold anything even then: every word is clamped to
// what exists before it becomes an address.
//
// A record may be read before the wait, because nothing behind the schedule kernel in its stream starts before that has
// ended: it lets no kernel begin early (grid_dependency_launch), and what it wrote is in the L2 by then.
#pragma once

#include "forward/scheduler/stream_k.cuh"
#include "forward/smem_plan.hpp"

namespace flashspark {

// The words of a record: of WorkTile, Keys and SequenceMask, and of WorkRange where the range goes on in another row
// tile.
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

// Over everything that ranges and masks follow from, of all sequences.
FLASHSPARK_DEVICE int32_t lengths_checksum(const SequenceArguments &a) {
  uint32_t sum = 0;
  for (int32_t first = 0; first < a.num_seqs; first += 32) {
    const int32_t seq = first + ptx::lane();
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

// A CTA's record, one word a lane.
struct MetadataRecord {
  int32_t word;

  FLASHSPARK_DEVICE int32_t operator[](RecordField n) const { return ptx::uniform(ptx::shuffle(word, n)); }
  // Clamped to [0, most] before it becomes uniform, since there is no minimum in uniform registers. Negative words
  // count as too large.
  FLASHSPARK_DEVICE int32_t at(RecordField n, int32_t most) const {
    const auto x = static_cast<uint32_t>(ptx::shuffle(word, n));
    return ptx::uniform(static_cast<int32_t>(min_of(x, static_cast<uint32_t>(most))));
  }
  // Positions are at most 2^29 (the planner sees to it), so that sums of two fit in 31 bits.
  FLASHSPARK_DEVICE int32_t position(RecordField n) const { return at(n, 1 << 29); }
};

FLASHSPARK_DEVICE MetadataRecord read_record(const int32_t *scheduler_metadata) {
  return {ptx::load_of_device(scheduler_metadata + ptx::cta_x() * kRecordWords + ptx::thread_index() % 32)};
}

template <class Arguments>
FLASHSPARK_DEVICE RowTile row_tile_of(const Arguments &a, const MetadataRecord &record) {
  RowTile rows{};
  rows.seq = record.at(kSeq, a.num_seqs - 1);
  rows.head_kv = record.at(kHead, a.num_heads_kv - 1);
  rows.seqlen_q = record.at(kSeqlenQ, a.max_seqlen_q);
  // max_seqlen_q is at most total_q (arguments_of() on the host).
  rows.q_row = a.cu_seqlens_q != nullptr ? record.at(kQueryRow, a.total_q - rows.seqlen_q) : 0;
  rows.end_row = rows.seqlen_q * static_cast<int32_t>(a.group.value);
  rows.first_row = record.at(kFirstRow, rows.end_row);
  rows.valid = record[kValid] != 0 && rows.first_row < rows.end_row;
  return rows;
}
FLASHSPARK_DEVICE KeyTileRange key_range_of(const TileSchedulerArguments &a, const MetadataRecord &record) {
  return {record.position(kFirstKeyTile), record.position(kNumKeyTiles), record[kIsFinal] != 0,
          record.at(kPartialSlot, 2 * a.stream_k.ctas - 1), record[kHasNext] != 0};
}
FLASHSPARK_DEVICE Keys keys_of(const SequenceArguments &a, const MetadataRecord &record) {
  Keys keys{};
  const int32_t row = a.cu_seqlens_k != nullptr ? record.at(kKeysRow, a.key_rows) : 0;
  keys.row = row;
  keys.begin = record.at(kKeysBegin, a.key_rows - row);
  keys.end = record.at(kKeysEnd, a.key_rows - row);
  keys.batch = record.at(kKeysBatch, a.last_batch);
  if (a.page_table != nullptr) keys.pages = a.page_table + keys.batch * a.page_table_stride;
  return keys;
}
template <class Arguments>
FLASHSPARK_DEVICE WorkRange work_range_of(const Arguments &a, const MetadataRecord &record) {
  return {record.position(kRangeNext),
          record.position(kRangeEnd),
          record.at(kTileStartCost, a.stream_k.tile_start_cost),
          {record.at(kPrefixSeqs, a.num_seqs), record.position(kPrefixPositions)},
          record.position(kRangeSkip)};
}

// Work tiles of a kernel that supports Stream-K, whichever of three ways the host has chosen: a row tile a CTA, ranges
// found from the lengths, or ranges from scheduler metadata.
template <class T>
struct StreamKScheduler {
  const ForwardArguments &a;
  MetadataRecord record{};
  GridCoordinate coordinate{};
  bool from_metadata = false;  // the next work tile is the record's, and the wait for the previous kernel still to come
  bool is_first = true, stale = false;

  explicit FLASHSPARK_DEVICE StreamKScheduler(const ForwardArguments &arguments) : a(arguments) {}

  // Up to the wait for the previous kernel, or with metadata past it. False: there is no work.
  FLASHSPARK_DEVICE bool begin() {
    // Before all else: the rest up to the wait takes as long as this read.
    if (a.scheduler_metadata != nullptr) record = read_record(a.scheduler_metadata);
    coordinate = grid_coordinate(a);
    if (coordinate.rank < 0 || warm_constant_cache(a)) return false;
    from_metadata = a.scheduler_metadata != nullptr && record[kFingerprint] == a.metadata_fingerprint;
    if (!from_metadata) wait_for_previous_kernel();
    return true;
  }

  // False: nothing is left. A work tile without rows is a stale record's: goes_on() says so, and the next call finds
  // the work tile from the lengths.
  FLASHSPARK_DEVICE bool next(WorkTile &work) {
    const ptx::SharedAddress memory =
        ptx::shared_memory() + T::kSharedMemory.work_ranges + ptx::thread_index() / 32 * kWorkRangeBytes;
    if (from_metadata) {
      work = {row_tile_of(a, record), key_range_of(a, record)};
      if (work.keys.has_next) save_range(memory, work_range_of(a, record));
      if (work.rows.valid) return true;
      wait_for_previous_kernel();
      if (lengths_checksum(a) == record[kLengthsChecksum]) return false;  // there is no work, indeed
      stale = true;
      return true;
    } else if (a.stream_k.ctas > 0) {
      WorkRange range{};
      if (!is_first) range = load_range(memory);
      work = find_work_tile<T::ScoreMod::kNative>(a, T::rows(a), T::kKeys, is_first, range);
      if (work.keys.has_next) save_range(memory, range);
    } else {
      work = {single_tile(a, coordinate, T::kRows), even_split(a)};
    }
    return work.rows.valid;
  }

  FLASHSPARK_DEVICE Keys keys(const WorkTile &work) const {
    return from_metadata ? keys_of(a, record) : find_keys(a, work.rows.seq);
  }
  FLASHSPARK_DEVICE bool causal(const WorkTile &work) const {
    return from_metadata ? record[kCausal] != 0 : is_causal(a, work.rows.seq);
  }
  // The wait, where it is still to come. Page numbers may be read behind it, and then confirm() asked.
  FLASHSPARK_DEVICE void wait() const {
    if (from_metadata) wait_for_previous_kernel();
  }
  // False: the record is of other lengths, and the work tile is left alone; next() finds the one that the lengths say.
  FLASHSPARK_DEVICE bool confirm() {
    stale = from_metadata && lengths_checksum(a) != record[kLengthsChecksum];
    return !stale;
  }
  // Whether there is another work tile behind this one, or a stale one to replace.
  FLASHSPARK_DEVICE bool goes_on(const WorkTile &work) {
    from_metadata = false;
    is_first = stale;
    if (stale) return true;
    if (!work.keys.has_next) return false;
    ptx::cta_barrier();  // all are done with this work tile's shared memory
    // Only positions lead here, which need no coordinate: ptxas cannot see it, and d256_decode has no registers to
    // spare where K and V are converted. With bf16 K and V it spills more with this line than without.
    if constexpr (!T::Mma::kAsyncQueries) coordinate = {};
    return true;
  }
  // Which of the row tile's key tiles, counted as in `tiles`, are the CTA's.
  FLASHSPARK_DEVICE Interval key_tiles(const WorkTile &work, const KeyTiles &tiles) const {
    if (a.stream_k.ctas == 0) return even_key_tiles(a, tiles);
    constexpr bool kTwo = T::ScoreMod::kNative;
    return {tiles.template before<kTwo>(work.keys.first),
            tiles.template before<kTwo>(work.keys.first + work.keys.count)};
  }
};

// One warp, CTA x, writes the record of CTA x of the forward kernel.
template <class Arguments>
FLASHSPARK_DEVICE void write_scheduler_metadata(const Arguments &a) {
  ptx::grid_dependency_wait();
  WorkRange range{};
  const WorkTile work = find_work_tile<true>(a, a.tile_rows, a.tile_keys, true, range);
  const Keys keys = work.rows.valid ? find_keys(a, work.rows.seq) : Keys{};
  const int32_t lengths = lengths_checksum(a), lane = ptx::lane();
  int32_t word = 0;
  const auto put = [&word, lane](RecordField n, int64_t value) {
    if (lane == n) word = static_cast<int32_t>(value);
  };
  put(kFingerprint, a.metadata_fingerprint);
  put(kLengthsChecksum, lengths);
  put(kValid, work.rows.valid);
  put(kFirstKeyTile, work.keys.first);
  put(kNumKeyTiles, work.keys.count);
  put(kIsFinal, work.keys.is_final);
  put(kPartialSlot, work.keys.partial_slot);
  put(kHasNext, work.keys.has_next);
  put(kSeq, work.rows.seq);
  put(kHead, work.rows.head_kv);
  put(kSeqlenQ, work.rows.seqlen_q);
  put(kQueryRow, work.rows.q_row);
  put(kFirstRow, work.rows.first_row);
  put(kKeysBegin, keys.begin);
  put(kKeysEnd, keys.end);
  put(kKeysRow, keys.row);
  put(kKeysBatch, keys.batch);
  put(kCausal, work.rows.valid && is_causal(a, work.rows.seq));
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
