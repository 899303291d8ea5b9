// Every kernel on every problem of the feature matrix that it fits, and what the rules promise besides right numbers.
#include <gtest/gtest.h>

#include <set>

#include "attention/harness.hpp"

namespace flashspark::emulator {
namespace {

class EveryKernel : public testing::TestWithParam<Kernel> {};

// The matrix holds over a hundred problems a kernel, some of them long: each kernel takes every kernels().size()-th of
// the plain ones, from another start, and all of those that are about its own head_dim.
TEST_P(EveryKernel, RunsTheFeatureMatrix) {
  const Kernel &kernel = GetParam();
  const std::vector<cases::Case> matrix = cases::feature_matrix();
  int ran = 0;
  size_t place = static_cast<size_t>(&kernel - kernels().data());
  for (size_t n = 0; n < kernels().size(); ++n) {
    if (name_of(kernels()[n]) == name_of(kernel)) place = n;
  }
  for (size_t n = 0; n < matrix.size(); ++n) {
    cases::Case spec = matrix[n];
    if (spec.group != "head-dim" && n % 4 != place % 4) continue;
    spec.q_dtype = spec.kv_dtype = spec.out_dtype = kernel.dtype;
    if (kernel.dtype == FLASHSPARK_FLOAT8_E4M3) {  // every type of q and out; factors of every kind
      constexpr int32_t kTypes[] = {FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT16, FLASHSPARK_FLOAT8_E4M3};
      constexpr cases::Descale kDescales[] = {cases::Descale::kNone, cases::Descale::kPerTensor,
                                              cases::Descale::kPerHead, cases::Descale::kFull};
      spec.q_dtype = kTypes[n % 3];
      spec.out_dtype = kTypes[n / 3 % 3];
      spec.q_descale = kDescales[n / 2 % 4], spec.k_descale = kDescales[n / 5 % 4],
      spec.v_descale = kDescales[n / 7 % 4];
    }
    if (kernel.dtype != FLASHSPARK_FLOAT8_E4M3 && n % 5 == 2) spec.out_dtype = FLASHSPARK_FLOAT8_E4M3;
    spec.output_scale = spec.out_dtype == FLASHSPARK_FLOAT8_E4M3 && n % 2 == 0 ? 0.02f : 0.0f;
    // The kernel's own width, so that it is not always half zeros; its neighbour's too where that leaves a tail.
    if (spec.group != "head-dim") {
      const int unit = kernel.dtype == FLASHSPARK_FLOAT8_E4M3 ? 16 : 8;
      spec.head_dim = kernel.instance->head_dim - (n % 8 == 0 ? unit : 0);
      spec.head_dim_v = kernel.instance->head_dim_v - (n % 8 == 4 ? 3 * unit : 0);
    }
    int64_t keys = 0;
    for (const cases::SeqLen &len : spec.lens) keys += len.k * std::max<int64_t>(1, len.q / 64);
    if (keys > 2500) continue;  // "long-splits": fuzzed with fewer keys
    const cases::Problem problem(spec);
    if (!can_run(kernel, problem)) continue;
    EXPECT_EQ(check(spec, &kernel, 1 + n), "");
    ++ran;
  }
  EXPECT_GE(ran, 10);
}

std::vector<Kernel> all() {
  return {kernels().begin(), kernels().end()};
}
INSTANTIATE_TEST_SUITE_P(Forward, EveryKernel, testing::ValuesIn(all()),
                         [](const auto &kernel) { return name_of(kernel.param); });

// What CMake makes of kernels.json.
TEST(Forward, EveryInstanceIsLinkedIn) {
  std::set<std::string> expected{"d128_prefill_e4m3_sm_90", "d128_short_q_e4m3_sm_90", "d64_short_q_fp16_sm_120f",
                                 "d128_prefill_fp16_sm_120f", "d256_prefill_mod_fp16_sm_120f"};
  for (const Instance &instance : kInstances) {
    for (const char *variant : {"_bf16_sm_120f", "_e4m3_sm_120f"})
      expected.insert(instance.name + std::string(variant));
    if (instance.sm_90 != instance.sm_120f) expected.insert(instance.name + std::string("_bf16_sm_90"));
  }
  std::set<std::string> found;
  for (const Kernel &kernel : kernels()) EXPECT_TRUE(found.insert(name_of(kernel)).second) << name_of(kernel);
  EXPECT_EQ(found, expected);
}

cases::Case plain(std::vector<cases::SeqLen> lens) {
  cases::Case c;
  c.name = "plain";
  c.lens = std::move(lens);
  c.heads_q = 2, c.heads_kv = 1;
  return c;
}

// A mask costs nothing where a tile is full, and a tile without a kept key costs nothing at all.
TEST(Forward, WorkIsWhatTheMaskKeeps) {
  const auto mma = [](const cases::Case &spec) {
    cases::Problem problem(spec);
    return run(problem, nullptr, 4).counters.mma;  // seed 4: tiles of sm_90, and no split
  };
  cases::Case c = plain({{256, 256}});
  c.num_splits = 1;
  const uint64_t full = mma(c);
  c.causal = true;
  const uint64_t causal = mma(c);
  EXPECT_LT(causal, full * 6 / 10);
  c.window_left = 10;
  EXPECT_LT(mma(c), causal * 7 / 10);
}

// Blocks share all work evenly, whatever it is: one long sequence among short ones, sequences without keys, with
// windows and without rows, on 1 to 7 SMs.
TEST(Forward, DecodeOfUnequalLengths) {
  struct Batch {
    int64_t heads_kv;
    std::vector<cases::SeqLen> lens;
  };
  const Batch batches[] = {
      {2, {{1, 1500}, {1, 3}, {1, 0}, {2, 70}, {0, 40}, {1, 1}}},
      {1, {{1, 2500}}},  // so many pieces that several warps join a row, in the block of their row tile
      {1, {{6, 2500}}},  // ... of 18 rows, for which an SM holds two blocks
      {1, {{1, 40}, {1, 2500}, {1, 3}}},  // ... and in those of all shares that meet in it
      {2, {{2, 0}, {1, 0}, {1, 900}}},
      {2, {{1, 513}, {1, 513}, {1, 513}}},
      {2, {{45, 400}, {1, 200}, {20, 25}}},  // several row tiles of a sequence, with seed 11: the L2 is large then
      {2, std::vector<cases::SeqLen>(37, {1, 200})},
  };
  for (const auto &[heads_kv, lens] : batches) {
    for (const int64_t window : {-1, 100}) {
      cases::Case c = plain(lens);
      c.heads_q = 3 * heads_kv, c.heads_kv = heads_kv;
      c.kv_layout = cases::Layout::kPaged;
      c.causal = true;
      c.window_left = window;
      c.sinks = window > 0;
      for (uint64_t seed = 1; seed < 14; seed += 2)  // odd: tiles of sm_120f
        EXPECT_EQ(check(c, nullptr, seed), "") << lens.size() << " sequences, window " << window;
    }
  }
}

// A schedule knows what each layout counts keys from, and which sequences are causal; one of other lengths is not
// believed.
TEST(Forward, ScheduledDecodeOfEveryLayout) {
  cases::Case padded = plain({{1, 700}, {1, 30}, {2, 333}, {1, 90}});
  padded.heads_q = 3;
  padded.kv_layout = cases::Layout::kDense, padded.seqused_k = true;
  cases::Case varlen = padded, indexed = padded, mixed = padded;
  padded.leftpad = 9;
  varlen.kv_layout = cases::Layout::kVarlen;
  indexed.kv_batch_index = true;
  mixed.kv_layout = cases::Layout::kPaged, mixed.causal_per_seq = true;
  for (const cases::Case &c : {padded, varlen, indexed, mixed}) {
    for (const uint64_t seed : {3, 11, 5, 13, 23, 31})  // of its own lengths, of others, of another problem; twice each
      EXPECT_EQ(check(c, nullptr, seed), "") << "leftpad " << c.leftpad << ", layout " << static_cast<int>(c.kv_layout);
  }
}

// Metadata of sequences without query rows is never read: page numbers and lengths of padded rows are stale.
TEST(Forward, PaddedRowsReadNothing) {
  cases::Case c = plain({{3, 100}, {1, 40}, {0, 30}, {0, 20}});
  c.kv_layout = cases::Layout::kPaged;
  cases::Problem problem(c);
  auto *used = const_cast<int32_t *>(problem.params.seqused_k);
  auto *pages = const_cast<int32_t *>(problem.params.page_table);
  for (int64_t b = 2; b < 4; ++b) {
    used[b] = 1 << 28;
    for (int64_t n = 0; n < problem.params.num_page_slots; ++n) pages[b * problem.params.page_table_stride + n] = -7;
  }
  EXPECT_NO_THROW(run(problem, nullptr, 3));
}

}  // namespace
}  // namespace flashspark::emulator
