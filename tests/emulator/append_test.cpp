// The append kernel against the CPU implementation: every dtype, cache layout and kind of rotation, in allocations of
// exact size.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "append/append.cuh"
#include "cpu/append.hpp"
#include "cuda/append.hpp"
#include "dtype.hpp"
#include "emulator.hpp"

namespace flashspark::emulator {
namespace {

struct Spec {
  int32_t new_dtype = FLASHSPARK_BFLOAT16, cache_dtype = FLASHSPARK_BFLOAT16;
  bool varlen = false, paged = true, batch_index = false, odd_strides = false, heads_first = false;
  int64_t rotary_dim = 0;
  bool interleaved = true, turn_q = false, q_per_token = true;
  // own_q: q has its own row count, 2 per sequence, or given by offsets (varlen_q), possibly not all in use (used_q).
  // own_positions: rotary_seqlens is given.
  bool own_q = false, varlen_q = false, used_q = false, own_positions = false;
  int64_t head_dim = 64, head_dim_v = 64, heads = 3, page_size = 16;
  bool slots = false;  // slot_mapping instead of lengths and page table; requires paged
};

// One problem with its memory. The same seed gives the same problem.
struct Problem {
  AppendParams p{};
  std::vector<uint8_t> k_new, v_new, k_cache, v_cache, q, cos, sin;
  std::vector<int32_t> seqlens, cu, cu_q, used_q, index, positions_before, pages;
  std::vector<int64_t> slots, positions;
  std::vector<float> k_descale, v_descale;

  static void fill(std::vector<uint8_t> &bytes, int64_t count, int32_t dtype, std::mt19937 &rng, float spread) {
    bytes.resize(static_cast<size_t>(count) * dtype_size(dtype));
    std::normal_distribution<float> normal(0, spread);
    for (int64_t n = 0; n < count; ++n) store_from_float(bytes.data(), n, dtype, normal(rng));
  }
  flashspark_tensor tensor(std::vector<uint8_t> &bytes, int64_t batch, int64_t tokens, int64_t heads, int64_t width,
                           int32_t dtype, bool odd, bool heads_first, std::mt19937 &rng) {
    const int64_t row = width + (odd ? 3 : 0);
    fill(bytes, batch * tokens * heads * row, dtype, rng, 1.0f);
    if (heads_first) return {bytes.data(), tokens * heads * row, row, tokens * row, dtype, 0};
    return {bytes.data(), tokens * heads * row, heads * row, row, dtype, 0};
  }

  Problem(const Spec &s, uint32_t seed) {
    std::mt19937 rng(seed);
    const auto from = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    p.num_seqs = s.slots ? 1 : s.varlen ? 40 : 3;  // 40: more than one round of a warp
    p.num_heads_kv = s.heads, p.num_heads_q = 2 * s.heads;
    p.head_dim = s.head_dim, p.head_dim_v = s.head_dim_v;
    p.seqlen_new = 5;
    std::vector<int32_t> rows(static_cast<size_t>(p.num_seqs), 5);
    if (s.varlen) {
      cu.push_back(2);  // rows before the first sequence belong to no sequence
      for (int32_t &count : rows) cu.push_back(cu.back() + (count = from(0, 5)));
      p.total_new = cu.back() + 1;
      p.cu_seqlens_new = cu.data();
    }
    if (s.slots) p.total_new = 23;
    const bool packed = s.varlen || s.slots;
    const int64_t batch = packed ? 1 : p.num_seqs, tokens = packed ? p.total_new : p.seqlen_new;
    p.k_new = tensor(k_new, batch, tokens, s.heads, s.head_dim, s.new_dtype, s.odd_strides, false, rng);
    p.v_new = tensor(v_new, batch, tokens, s.heads, s.head_dim_v, s.new_dtype, s.odd_strides, false, rng);
    for (int32_t count : rows) seqlens.push_back(from(0, 48 - count));
    if (!s.slots) p.seqlens = seqlens.data();
    if (s.slots) {
      p.page_size = s.page_size, p.num_pages = 5;
      for (int64_t n = 0; n < p.num_pages * p.page_size; ++n) slots.push_back(n);
      std::shuffle(slots.begin(), slots.end(), rng);
      slots.resize(static_cast<size_t>(p.total_new));
      for (const int n : {0, 7, 8, 22}) slots[static_cast<size_t>(n)] = n == 8 ? INT64_MIN : -1;
      p.slot_mapping = slots.data();
    } else if (s.paged) {
      // One page table row per cache row; with kv_batch_index there are two more rows than sequences.
      const int64_t rows = p.num_seqs + (s.batch_index ? 2 : 0), slots_each = (48 + s.page_size - 1) / s.page_size;
      p.page_size = s.page_size, p.num_page_slots = p.page_table_stride = slots_each;
      p.num_pages = slots_each * rows + 2;
      for (int64_t n = 0; n < p.num_pages; ++n) pages.push_back(static_cast<int32_t>(n));
      std::shuffle(pages.begin(), pages.end(), rng);
      pages.resize(static_cast<size_t>(slots_each * rows));
      p.page_table = pages.data();
    } else {
      p.seqlen_cache = 48;
    }
    if (!s.slots) {
      p.num_cache_rows = p.num_seqs + 2;
      for (int64_t b = 0; b < p.num_seqs; ++b) index.push_back(static_cast<int32_t>(b + 1));
      std::shuffle(index.begin(), index.end(), rng);
      if (s.batch_index) p.kv_batch_index = index.data();
    }
    const int64_t outer = s.paged ? p.num_pages : p.num_cache_rows, inner = s.paged ? p.page_size : 48;
    p.k_cache = tensor(k_cache, outer, inner, s.heads, s.head_dim, s.cache_dtype, s.odd_strides, s.heads_first, rng);
    p.v_cache = tensor(v_cache, outer, inner, s.heads, s.head_dim_v, s.cache_dtype, s.odd_strides, s.heads_first, rng);
    for (int64_t n = 0; n < p.num_seqs * s.heads; ++n) {
      k_descale.push_back(0.25f * static_cast<float>(from(1, 9)));
      v_descale.push_back(0.25f * static_cast<float>(from(1, 9)));
    }
    p.k_descale = {k_descale.data(), s.heads, 1};
    p.v_descale = {v_descale.data(), 0, 1};
    if (s.rotary_dim > 0) {
      p.rotary_dim = s.rotary_dim, p.seqlen_rotary = 48, p.rotary_dtype = FLASHSPARK_FLOAT32;
      p.rotary_interleaved = s.interleaved, p.q_rotary_per_token = s.q_per_token;
      p.rotary_stride = s.odd_strides ? s.rotary_dim / 2 + 5 : 0;
      const int64_t numbers = 47 * (s.odd_strides ? p.rotary_stride : s.rotary_dim / 2) + s.rotary_dim / 2;
      fill(cos, numbers, FLASHSPARK_FLOAT32, rng, 0.7f);
      fill(sin, numbers, FLASHSPARK_FLOAT32, rng, 0.7f);
      p.rotary_cos = cos.data(), p.rotary_sin = sin.data();
    }
    if (s.rotary_dim > 0 && s.slots) {
      for (int64_t t = 0; t < p.total_new; ++t) positions.push_back(from(0, 47));
      p.rotary_positions = positions.data();
    }
    if (s.turn_q) choose_queries(s, tokens, rng);
    if (s.own_positions) {
      for (int64_t b = 0; b < p.num_seqs; ++b) positions_before.push_back(from(0, 40));
      p.rotary_seqlens = positions_before.data();
    }
  }

  void choose_queries(const Spec &s, int64_t tokens, std::mt19937 &rng) {
    const auto from = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    p.seqlen_q = s.own_q ? 2 : p.seqlen_new;
    if (s.slots) p.total_q = p.total_new;
    if (s.varlen && !s.own_q) {
      p.cu_seqlens_q = cu.data();
      p.total_q = p.total_new;
    }
    if (s.varlen_q) {
      cu_q.push_back(1);
      for (int64_t b = 0; b < p.num_seqs; ++b) cu_q.push_back(cu_q.back() + from(0, 2));
      p.cu_seqlens_q = cu_q.data();
      p.total_q = cu_q.back() + 1;
    }
    if (s.used_q) {
      for (int64_t b = 0; b < p.num_seqs; ++b)
        used_q.push_back(from(0, static_cast<int>(s.varlen_q ? cu_q[b + 1] - cu_q[b] : p.seqlen_q)));
      p.seqused_q = used_q.data();
    }
    const bool packed = p.cu_seqlens_q != nullptr || s.slots;
    const int64_t rows = s.slots ? tokens : packed ? p.total_q : p.seqlen_q;
    p.q = tensor(q, packed ? 1 : p.num_seqs, rows, p.num_heads_q, s.head_dim, FLASHSPARK_BFLOAT16, s.odd_strides, false,
                 rng);
  }
};

Counters run(const AppendParams &p, uint64_t seed) {
  const cuda::AppendPlan plan = cuda::make_append_plan(p);
  LaunchOptions options;
  std::copy_n(plan.launch.grid, 3, options.grid);
  options.threads = plan.launch.threads;
  options.seed = seed;
  return launch(options, [&plan] { append(plan.arguments); });
}

// Equal, up to one unit in the last place where the sum of two products may round differently.
void expect_near(const std::vector<uint8_t> &got, const std::vector<uint8_t> &want, int32_t dtype, const char *what) {
  ASSERT_EQ(got.size(), want.size());
  const float step = dtype == FLASHSPARK_FLOAT8_E4M3 ? 0.13f : dtype == FLASHSPARK_FLOAT32 ? 1e-6f : 0.008f;
  for (size_t n = 0; n < got.size() / dtype_size(dtype); ++n) {
    const float x = load_as_float(got.data(), static_cast<int64_t>(n), dtype);
    const float y = load_as_float(want.data(), static_cast<int64_t>(n), dtype);
    if (std::isnan(x) && std::isnan(y)) continue;
    ASSERT_LE(std::fabs(x - y), step * std::fabs(y) + 1e-6f) << what << " " << n;
  }
}

void compare(const Spec &spec, uint32_t seed) {
  Problem expected(spec, seed), got(spec, seed);
  cpu::append_kv(expected.p);
  ASSERT_NO_THROW(run(got.p, seed));
  if (spec.rotary_dim == 0) {
    EXPECT_EQ(got.k_cache, expected.k_cache) << seed;
  } else {
    expect_near(got.k_cache, expected.k_cache, spec.cache_dtype, "k");
    if (spec.turn_q) expect_near(got.q, expected.q, FLASHSPARK_BFLOAT16, "q");
  }
  EXPECT_EQ(got.v_cache, expected.v_cache) << seed;
}

TEST(Append, EveryType) {
  constexpr int32_t kTypes[] = {FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16};
  for (const int32_t type : kTypes) {
    for (const int32_t cache : {type, static_cast<int32_t>(FLASHSPARK_FLOAT8_E4M3)}) {
      for (const int64_t rotary : {0, 16}) {
        Spec s;
        s.new_dtype = type, s.cache_dtype = cache, s.rotary_dim = rotary;
        compare(s, static_cast<uint32_t>(type * 10 + cache));
      }
    }
  }
  Spec s;
  s.new_dtype = s.cache_dtype = FLASHSPARK_FLOAT8_E4M3;  // bytes are copied unchanged
  compare(s, 7);
}

TEST(Append, EveryLayout) {
  uint32_t seed = 100;
  for (const bool varlen : {false, true}) {
    for (const bool paged : {false, true}) {
      for (const bool odd : {false, true}) {
        for (const bool heads_first : {false, true}) {
          Spec s;
          s.varlen = varlen, s.paged = paged, s.odd_strides = odd, s.heads_first = heads_first;
          s.batch_index = odd;
          s.head_dim = odd ? 40 : 128, s.head_dim_v = odd ? 72 : 128;
          compare(s, ++seed);
          s.rotary_dim = odd ? 12 : 128, s.interleaved = heads_first, s.turn_q = true, s.q_per_token = !varlen;
          compare(s, ++seed);
        }
      }
    }
  }
}

TEST(Append, SlotMapping) {
  uint32_t seed = 200;
  for (const int32_t cache : {FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT8_E4M3}) {
    for (const bool odd : {false, true}) {
      for (const bool heads_first : {false, true}) {
        for (const int64_t page_size : {16, 7, 48}) {
          Spec s;
          s.slots = true, s.cache_dtype = cache, s.odd_strides = odd, s.heads_first = heads_first;
          s.page_size = page_size, s.head_dim = odd ? 40 : 128, s.head_dim_v = odd ? 72 : 128;
          compare(s, ++seed);
          s.rotary_dim = odd ? 12 : 128, s.interleaved = heads_first, s.turn_q = true, s.q_per_token = page_size == 7;
          compare(s, ++seed);
        }
      }
    }
  }
}

TEST(Append, QueriesWithRowsOfTheirOwn) {
  uint32_t seed = 300;
  for (const bool varlen : {false, true}) {
    for (const bool varlen_q : {false, true}) {
      for (const bool used : {false, true}) {
        for (const bool per_token : {false, true}) {
          Spec s;
          s.varlen = varlen, s.own_q = true, s.varlen_q = varlen_q, s.used_q = used, s.q_per_token = per_token;
          s.turn_q = true, s.rotary_dim = 16, s.own_positions = used != per_token;
          compare(s, ++seed);
        }
      }
    }
  }
}

TEST(Append, AnyPageSize) {
  uint32_t seed = 400;
  for (const int64_t page_size : {1, 3, 20, 48}) {
    Spec s;
    s.page_size = page_size, s.batch_index = page_size == 3;
    compare(s, ++seed);
  }
}

// Rows of padded CUDA graph batches, and metadata errors that the host cannot see: the row is skipped, and nothing is
// read or written for it.
TEST(Append, RowsWithoutAValidSlotAreSkipped) {
  const auto untouched = [](const Spec &spec, auto &&spoil) {
    Problem got(spec, 5);
    spoil(got);
    const std::vector<uint8_t> before = got.k_cache, q_before = got.q;
    ASSERT_NO_THROW(run(got.p, 5));
    EXPECT_EQ(got.k_cache, before);
    // q is rotated even where a token has no slot
    if (got.slots.empty() || got.slots[1] >= 0) EXPECT_EQ(got.q, q_before);
  };
  Spec s;
  untouched(s, [](Problem &x) { std::fill(x.pages.begin(), x.pages.end(), -1); });
  untouched(s, [](Problem &x) { std::fill(x.pages.begin(), x.pages.end(), static_cast<int32_t>(x.p.num_pages)); });
  untouched(s, [](Problem &x) { std::fill(x.seqlens.begin(), x.seqlens.end(), 48); });
  untouched(s, [](Problem &x) { std::fill(x.seqlens.begin(), x.seqlens.end(), -3); });
  untouched(s, [](Problem &x) { std::fill(x.seqlens.begin(), x.seqlens.end(), 1 << 28); });
  untouched(s, [](Problem &x) { std::fill(x.seqlens.begin(), x.seqlens.end(), INT32_MAX); });
  s.batch_index = true;
  for (const int32_t wild : {-1, INT32_MIN, INT32_MAX, 1000})
    untouched(s, [wild](Problem &x) { std::fill(x.index.begin(), x.index.end(), wild); });
  s.batch_index = false, s.varlen = true;
  for (const int32_t wild : {INT32_MIN, -5, 0})
    untouched(s, [wild](Problem &x) { std::fill(x.cu.begin(), x.cu.end(), wild); });
  s.varlen = false;
  s.slots = true;
  untouched(s, [](Problem &x) { std::fill(x.slots.begin(), x.slots.end(), -1); });
  untouched(s, [](Problem &x) { std::fill(x.slots.begin(), x.slots.end(), x.p.num_pages * x.p.page_size); });
  untouched(s, [](Problem &x) { std::fill(x.slots.begin(), x.slots.end(), int64_t{1} << 32); });
  s.rotary_dim = 16, s.turn_q = true;
  untouched(s, [](Problem &x) { std::fill(x.slots.begin(), x.slots.end(), -1); });
  untouched(s, [](Problem &x) { std::fill(x.positions.begin(), x.positions.end(), 48); });
  untouched(s, [](Problem &x) { std::fill(x.positions.begin(), x.positions.end(), -1); });
  untouched(s, [](Problem &x) { std::fill(x.positions.begin(), x.positions.end(), int64_t{1} << 32); });
  s.rotary_dim = 0, s.turn_q = false;
  s.slots = false, s.paged = false, s.batch_index = true;
  untouched(s, [](Problem &x) { std::fill(x.index.begin(), x.index.end(), static_cast<int32_t>(x.p.num_cache_rows)); });
  s.rotary_dim = 16;
  untouched(s, [](Problem &x) { x.p.seqlen_rotary = 0; });
}

}  // namespace
}  // namespace flashspark::emulator
