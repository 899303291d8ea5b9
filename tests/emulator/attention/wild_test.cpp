// Out-of-range device metadata must not make a kernel access memory outside its tensors. Every metadata array in turn
// is filled with wild values, for every layout and kernel; AddressSanitizer guards the ends of all allocations.
#include <gtest/gtest.h>

#include <random>

#include "attention/harness.hpp"
#include "forward/scheduler/metadata.cuh"

namespace flashspark::emulator {
namespace {

// An int32 metadata array of the problem, and its name.
struct Metadata {
  const char *name;
  const int32_t *(*data)(const Params &);
  int64_t (*count)(const Params &);
};
int64_t offsets(const Params &p) {
  return p.num_seqs + 1;
}
int64_t one_each(const Params &p) {
  return p.num_seqs;
}
int64_t pages(const Params &p) {
  return p.num_seqs * p.page_table_stride;
}
int64_t ranges(const Params &p) {
  const int64_t tokens = p.cu_seqlens_q != nullptr ? p.total_q : p.num_seqs * p.max_seqlen_q;
  return 2 * (p.prefix_mode == FLASHSPARK_PREFIX_PER_TOKEN ? tokens : p.num_seqs * p.num_prefix_ranges);
}
#define METADATA(name, count)                            \
  Metadata {                                             \
    #name, [](const Params &p) { return p.name; }, count \
  }
const Metadata kMetadata[] = {
    METADATA(cu_seqlens_q, offsets),    METADATA(cu_seqlens_k, offsets), METADATA(seqused_q, one_each),
    METADATA(seqused_k, one_each),      METADATA(leftpad_k, one_each),   METADATA(kv_batch_index, one_each),
    METADATA(page_table, pages),        METADATA(prefix_ranges, ranges), METADATA(rswa_prefix_lens, one_each),
    METADATA(causal_per_seq, one_each),
};

int32_t wild(std::mt19937_64 &rng) {
  constexpr int32_t kValues[] = {INT32_MIN, INT32_MIN + 1, -100000,       -1,       0, 1, 17, 100000,
                                 1 << 28,   1 << 30,       INT32_MAX - 1, INT32_MAX};
  const uint64_t n = rng() % (std::size(kValues) + 1);
  return n < std::size(kValues) ? kValues[n] : static_cast<int32_t>(rng());
}

// Overwrites some or all values; with `pairs`, every pair becomes a non-empty range at the end of the int32 range.
void spoil(std::span<int32_t> numbers, std::mt19937_64 &rng, bool pairs) {
  if (pairs) {
    for (size_t n = 0; n < numbers.size(); ++n) numbers[n] = INT32_MAX - (n % 2 == 0 ? 1 : 0);
    return;
  }
  const bool all = rng() % 2 == 0;
  for (int32_t &number : numbers) {
    if (all || rng() % 3 == 0) number = wild(rng);
  }
}

cases::Case small(const Kernel &kernel) {
  cases::Case c;
  c.name = "wild";
  c.lens = {{1, 90}, {3, 40}, {0, 20}, {2, 7}};
  c.heads_q = 4, c.heads_kv = 2;
  c.head_dim = kernel.instance->head_dim, c.head_dim_v = kernel.instance->head_dim_v;
  c.q_dtype = c.kv_dtype = c.out_dtype = kernel.dtype;
  if (kernel.dtype == FLASHSPARK_FLOAT8_E4M3) c.q_dtype = c.out_dtype = FLASHSPARK_BFLOAT16;
  c.causal = true;
  return c;
}

// Layouts that together use every metadata array.
std::vector<cases::Case> layouts(const Kernel &kernel) {
  cases::Case varlen = small(kernel), paged = varlen, dense = varlen, padded = varlen;
  varlen.kv_layout = cases::Layout::kVarlen, varlen.seqused_q = true;
  paged.kv_layout = cases::Layout::kPaged, paged.causal_per_seq = true, paged.lens[0].k = 200;
  dense.q_layout = cases::Layout::kDense, dense.kv_layout = cases::Layout::kDense, dense.seqused_q = true;
  dense.seqused_k = dense.kv_batch_index = true;
  padded.kv_layout = cases::Layout::kPaged, padded.leftpad = 9, padded.window_left = 30, padded.num_splits = 3;
  std::vector<cases::Case> all{varlen, paged, dense, padded};
  if (kernel.instance->score_mod == ScoreMod::native) {
    for (const int32_t mode : {FLASHSPARK_PREFIX_PER_SEQ, FLASHSPARK_PREFIX_PER_TOKEN}) {
      cases::Case prefix = padded;
      prefix.prefix_mode = mode;
      all.push_back(prefix);
    }
    cases::Case rswa = paged;
    rswa.rswa_window = 20, rswa.causal_per_seq = false, rswa.leftpad = 9;
    all.push_back(rswa);
  }
  return all;
}

class WildMetadata : public testing::TestWithParam<Kernel> {};

TEST_P(WildMetadata, StaysWithinTheTensors) {
  const Kernel &kernel = GetParam();
  int ran = 0;
  for (const cases::Case &spec : layouts(kernel)) {
    for (const Metadata &metadata : kMetadata) {
      for (uint64_t seed = 1; seed <= 3; ++seed) {
        cases::Problem problem(spec);
        const int32_t *data = metadata.data(problem.params);
        if (data == nullptr || !can_run(kernel, problem)) continue;
        std::mt19937_64 rng(seed + 100 * static_cast<uint64_t>(ran));
        spoil({const_cast<int32_t *>(data), static_cast<size_t>(metadata.count(problem.params))}, rng, seed == 1);
        EXPECT_NO_THROW(execute(problem.params, &kernel, 2 * seed + 9)) << metadata.name << ", seed " << seed;
        ++ran;
      }
    }
  }
  EXPECT_GE(ran, 20);
}

// A record with the right fingerprint and checksum is accepted, so its other fields must be harmless whatever they
// hold.
TEST_P(WildMetadata, SchedulerMetadataStaysWithinTheTensors) {
  const Kernel &kernel = GetParam();
  if (!supports_stream_k(*kernel.instance)) return;  // other kernels take no scheduler metadata
  int spoiled = 0;
  for (const cases::Case &layout : layouts(kernel)) {
    for (uint64_t seed = 1; seed <= 12; ++seed) {
      cases::Case spec = layout;
      spec.num_splits = 0;
      cases::Problem problem(spec);
      if (!can_run(kernel, problem)) continue;
      std::mt19937_64 rng(seed);
      EXPECT_NO_THROW(execute(problem.params, &kernel, 2 * seed,
                              [&](std::span<int32_t> records) {
                                for (size_t record = 0; record < records.size(); record += kRecordWords) {
                                  for (size_t word = kValid; word < kRecordFields; ++word) {
                                    if (rng() % 4 == 0) records[record + word] = wild(rng), ++spoiled;
                                  }
                                }
                              }))
          << "seed " << seed;
    }
  }
  EXPECT_GT(spoiled, 0);
}

// A range that claims to end far away, or to begin before its batch prefix, must not keep its CTA busy forever: no CTA
// does more than the work of the whole batch.
TEST_P(WildMetadata, WorkRangesOfSpoiledRecordsEnd) {
  const Kernel &kernel = GetParam();
  if (!supports_stream_k(*kernel.instance)) return;
  cases::Case spec = layouts(kernel)[1];
  spec.num_splits = 0;
  for (const int32_t passed : {0, 1, 1 << 20, INT32_MAX}) {
    cases::Problem problem(spec);
    ASSERT_TRUE(can_run(kernel, problem));
    const uint64_t all = execute(problem.params, &kernel, 1).counters.mma;
    const auto spoiled = execute(problem.params, &kernel, 2, [passed](std::span<int32_t> records) {
      ASSERT_GT(records.size(), 0u);
      for (size_t record = 0; record < records.size(); record += kRecordWords) {
        records[record + kHasNext] = 1, records[record + kRangeNext] = 0, records[record + kRangeEnd] = INT32_MAX;
        records[record + kRangeSkip] = 0, records[record + kPrefixSeqs] = 0,
                         records[record + kPrefixPositions] = passed;
      }
    });
    EXPECT_LT(spoiled.counters.mma, 20 * all + 1000) << passed;
  }
}

std::vector<Kernel> some() {
  // Control flow depends on tiling and dtype, not on the head size: one head size of each tiling, and the instances
  // with single-stage buffers.
  std::vector<Kernel> chosen;
  for (const Kernel &kernel : kernels()) {
    const int64_t width = kernel.instance->head_dim;
    if (kernel.tiles == Architecture::sm_120f &&
        (width == 64 || (width == 256 && kernel.instance->tiling != Tiling::prefill)))
      chosen.push_back(kernel);
  }
  return chosen;
}
INSTANTIATE_TEST_SUITE_P(Forward, WildMetadata, testing::ValuesIn(some()),
                         [](const auto &kernel) { return name_of(kernel.param); });

// Lengths beyond the page table are clamped to its capacity.
TEST(WildLengths, BeyondThePageTableAreCutToIt) {
  cases::Case c;
  c.name = "beyond";
  c.lens = {{1, 64}, {2, 64}};
  c.heads_q = 2, c.heads_kv = 1;
  c.kv_layout = cases::Layout::kPaged, c.page_size = 16;
  c.causal = true;
  for (const uint64_t seed : {1, 3, 7}) {
    cases::Problem problem(c);
    constexpr int32_t capacity = 64;  // exactly the pages that the sequences fill
    problem.params.num_page_slots = capacity / problem.params.page_size;
    auto *used = const_cast<int32_t *>(problem.params.seqused_k);
    used[0] = used[1] = capacity;
    const cases::Result full = run(problem, nullptr, seed).result;
    for (const int32_t beyond : {capacity + 1, 1 << 20, INT32_MAX}) {
      problem.poison();
      used[0] = beyond;
      execute(problem.params, nullptr, seed);
      used[0] = capacity;
      EXPECT_EQ(problem.result().out, full.out) << beyond;
    }
  }
}

}  // namespace
}  // namespace flashspark::emulator
