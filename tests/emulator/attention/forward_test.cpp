// Runs every kernel on the problems of the feature matrix that it supports, and checks properties beyond numerical
// accuracy.
#include <gtest/gtest.h>

#include <set>

#include "attention/harness.hpp"

namespace flashspark::emulator {
namespace {

class EveryKernel : public testing::TestWithParam<Kernel> {};

// The matrix has more than a hundred problems, some of them long. Each kernel runs every fourth one, starting at a
// different offset, and all problems of the head-dim group.
TEST_P(EveryKernel, RunsTheFeatureMatrix) {
  const Kernel &kernel = GetParam();
  const std::vector<cases::Case> matrix = cases::feature_matrix();
  int ran = 0;
  size_t position = static_cast<size_t>(&kernel - kernels().data());
  for (size_t n = 0; n < kernels().size(); ++n) {
    if (name_of(kernels()[n]) == name_of(kernel)) position = n;
  }
  for (size_t n = 0; n < matrix.size(); ++n) {
    cases::Case spec = matrix[n];
    if (spec.group != "head-dim" && n % 4 != position % 4) continue;
    spec.q_dtype = spec.kv_dtype = spec.out_dtype = kernel.dtype;
    if (kernel.dtype == FLASHSPARK_FLOAT8_E4M3) {  // all q and out types, all kinds of descale factors
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
    // Use the kernel's own head size so that the tile is not half zero fill, and now and then a smaller one that leaves
    // a partial tail.
    if (spec.group != "head-dim") {
      const int unit = kernel.dtype == FLASHSPARK_FLOAT8_E4M3 ? 16 : 8;
      spec.head_dim = kernel.instance->head_dim - (n % 8 == 0 ? unit : 0);
      spec.head_dim_v = kernel.instance->head_dim_v - (n % 8 == 4 ? 3 * unit : 0);
    }
    int64_t keys = 0;
    for (const cases::SeqLen &len : spec.lens) keys += len.k * std::max<int64_t>(1, len.q / 64);
    if (keys > 2500) continue;  // "long-splits" takes too long here; the fuzzer covers splits with fewer keys
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

// Tiles that the mask leaves empty are skipped, so the number of MMA instructions follows the mask.
TEST(Forward, SkipsTilesThatTheMaskLeavesEmpty) {
  const auto mma = [](const cases::Case &spec) {
    cases::Problem problem(spec);
    return run(problem, nullptr, 4).counters.mma;  // seed 4 selects the sm_90 tiles; num_splits = 1
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

// Stream-K decode on 1 to 7 SMs: one long sequence among short ones, sequences without keys or without query rows,
// windows.
TEST(Forward, DecodeOfUnequalLengths) {
  struct Batch {
    int64_t heads_kv;
    std::vector<cases::SeqLen> lens;
  };
  const Batch batches[] = {
      {2, {{1, 1500}, {1, 3}, {1, 0}, {2, 70}, {0, 40}, {1, 1}}},
      {1, {{1, 2500}}},                   // so many partials that several warps combine one row
      {1, {{6, 2500}}},                   // 18 rows, for which an SM holds two CTAs of the combine kernel
      {1, {{1, 40}, {1, 2500}, {1, 3}}},  // the ranges of several sequences meet in one CTA
      {2, {{2, 0}, {1, 0}, {1, 900}}},
      {2, {{1, 513}, {1, 513}, {1, 513}}},
      {2, {{45, 400}, {1, 200}, {20, 25}}},  // several row tiles per sequence; seed 11 has a large L2
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
      for (uint64_t seed = 1; seed < 14; seed += 2)  // odd seeds select the sm_120f tiles
        EXPECT_EQ(check(c, nullptr, seed), "") << lens.size() << " sequences, window " << window;
    }
  }
}

// Every score modification and every mask of the native ones decodes through Stream-K, in tiles for few rows.
TEST(Forward, DecodeWithScoreModifications) {
  struct Modification {
    const char *name;
    void (*set)(cases::Case &);
  };
  const Modification modifications[] = {
      {"softcap", [](cases::Case &c) { c.softcap = 20; }},
      {"alibi", [](cases::Case &c) { c.alibi = true; }},
      {"relative bias", [](cases::Case &c) { c.rel_extent = 90; }},
      {"chunks", [](cases::Case &c) { c.attention_chunk = 300; }},
      {"prefix ranges of sequences",
       [](cases::Case &c) { c.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ, c.window_left = 40; }},
      {"prefix ranges of tokens",
       [](cases::Case &c) { c.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN, c.window_left = 40; }},
      {"rswa", [](cases::Case &c) { c.rswa_window = 100, c.causal = true; }},
      {"pages of 5", [](cases::Case &c) { c.page_size = 5; }},
  };
  for (const auto &[name, set] : modifications) {
    for (const int64_t rows : {1, 8}) {
      cases::Case c = plain({{rows, 1500}, {1, 3}, {1, 0}, {2, 170}, {0, 40}, {1, 1}});
      c.heads_q = 6, c.heads_kv = 2;
      c.kv_layout = cases::Layout::kPaged;
      c.causal = true;
      set(c);
      cases::Problem problem(c);
      const std::string kernel = run(problem, nullptr, 1).kernel;
      EXPECT_NE(kernel.find(rows == 1 ? "_decode_mod_" : "_short_q_mod_"), std::string::npos) << name << ": " << kernel;
      for (const uint64_t seed : {1, 3, 5, 7, 11})
        EXPECT_EQ(check(c, nullptr, seed), "") << name << ", " << rows << " tokens";
    }
  }
}

// Scheduler metadata records where each layout's keys begin and which sequences are causal. Metadata made from other
// lengths must be rejected.
TEST(Forward, DecodeWithSchedulerMetadataOfEveryLayout) {
  cases::Case padded = plain({{1, 700}, {1, 30}, {2, 333}, {1, 90}});
  padded.heads_q = 3;
  padded.kv_layout = cases::Layout::kDense, padded.seqused_k = true;
  cases::Case varlen = padded, indexed = padded, mixed = padded;
  padded.leftpad = 9;
  varlen.kv_layout = cases::Layout::kVarlen;
  indexed.kv_batch_index = true;
  mixed.kv_layout = cases::Layout::kPaged, mixed.causal_per_seq = true;
  for (const cases::Case &c : {padded, varlen, indexed, mixed}) {
    // two seeds each for this problem's lengths, other lengths, another problem
    for (const uint64_t seed : {3, 11, 5, 13, 23, 31})
      EXPECT_EQ(check(c, nullptr, seed), "") << "leftpad " << c.leftpad << ", layout " << static_cast<int>(c.kv_layout);
  }
}

// The kernels never read the metadata of sequences without query rows: in a padded batch those lengths and page numbers
// are stale.
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
