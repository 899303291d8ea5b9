// append_kv by slot_mapping against a model that moves bytes: the whole memory of the cache, neighbours included.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>

#include "dtype.hpp"
#include "flashspark/flashspark.h"

namespace flashspark::test {
namespace {

constexpr int32_t kF32 = FLASHSPARK_FLOAT32, kF16 = FLASHSPARK_FLOAT16, kBf16 = FLASHSPARK_BFLOAT16,
                  kFp8 = FLASHSPARK_FLOAT8_E4M3;
constexpr std::array<std::array<int32_t, 2>, 6> kTypes{
    {{kF32, kF32}, {kF16, kF16}, {kBf16, kBf16}, {kBf16, kFp8}, {kF32, kFp8}, {kFp8, kFp8}}};
enum Layout { kTokensFirst, kHeadsFirst, kPacked, kSpread, kBackwards, kLayouts };

// Some rows for a cache of some shape; all of it from the seed.
struct Slots {
  std::mt19937_64 rng;
  flashspark_append_params p;
  std::vector<unsigned char> k_new, v_new, k_cache, v_cache, q;
  std::vector<int64_t> slots, positions;
  std::vector<float> table;
  std::vector<float> scale{0.5f, 2, 4};  // powers of two: how they are divided by does not matter

  int64_t from(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
  void fill(std::vector<unsigned char> &bytes, int64_t count, int32_t dtype) {
    bytes.resize(count * dtype_size(dtype));
    std::normal_distribution<float> normal;
    for (int64_t n = 0; n < count; ++n) store_from_float(bytes.data(), n, dtype, normal(rng));
  }

  explicit Slots(uint64_t seed) : rng(seed) {
    flashspark_append_params_init(&p);
    const auto [new_type, cache_type] = kTypes[seed % kTypes.size()];
    const auto layout = static_cast<Layout>(seed / kTypes.size() % kLayouts);
    p.num_seqs = 1;
    p.num_heads_kv = from(1, 3);
    p.head_dim = 8 * from(1, 5);
    p.head_dim_v = 8 * from(1, 5);
    p.page_size = std::array{1, 7, 16, 48}[from(0, 3)];
    p.num_pages = from(1, 9);
    slots.resize(p.num_pages * p.page_size);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), rng);
    slots.resize(from(1, std::min<int64_t>(40, p.num_pages * p.page_size)));
    for (int64_t padding = from(0, 4); padding > 0; --padding) {
      slots.insert(slots.begin() + from(0, slots.size()), padding == 4 ? INT64_MIN : -1);
    }
    p.total_new = static_cast<int64_t>(slots.size());
    p.slot_mapping = slots.data();
    const int64_t heads = p.num_heads_kv;
    const auto rows = [&](std::vector<unsigned char> &bytes, int64_t width) {
      const int64_t row = heads * width + from(0, 3);
      fill(bytes, p.total_new * row, new_type);
      return flashspark_tensor{bytes.data(), 0, row, width, new_type, 0};
    };
    p.k_new = rows(k_new, p.head_dim);
    p.v_new = rows(v_new, p.head_dim_v);
    const auto cache = [&](std::vector<unsigned char> &bytes, int64_t width) {
      const int64_t row = width + (layout == kSpread ? from(1, 9) : 0), page = p.page_size * heads * row;
      fill(bytes, p.num_pages * page, cache_type);
      if (layout == kHeadsFirst) return flashspark_tensor{bytes.data(), page, row, p.page_size * row, cache_type, 0};
      if (layout != kBackwards) return flashspark_tensor{bytes.data(), page, heads * row, row, cache_type, 0};
      const size_t last = (p.num_pages * p.page_size - 1) * heads * row * dtype_size(cache_type);
      return flashspark_tensor{bytes.data() + last, -page, -heads * row, row, cache_type, 0};
    };
    if (layout == kPacked) {  // V behind K in one row
      p.k_cache = p.v_cache = cache(k_cache, p.head_dim + p.head_dim_v);
      p.v_cache.data = k_cache.data() + p.head_dim * dtype_size(cache_type);
    } else {
      p.k_cache = cache(k_cache, p.head_dim);
      p.v_cache = cache(v_cache, p.head_dim_v);
    }
    p.k_descale = {scale.data(), 0, 1};
    p.v_descale = {scale.data() + 1, 0, 0};
  }

  // Where row t of a head goes.
  int64_t place(const flashspark_tensor &cache, size_t t, int64_t h) const {
    return slots[t] / p.page_size * cache.batch_stride + slots[t] % p.page_size * cache.token_stride +
           h * cache.head_stride;
  }

  // What flashspark_append_kv should do to one of the caches.
  void write(const flashspark_tensor &fresh, const flashspark_tensor &cache, int64_t width,
             const flashspark_scale &descale) const {
    for (size_t t = 0; t < slots.size(); ++t) {
      if (slots[t] < 0) continue;
      for (int64_t n = 0; n < p.num_heads_kv * width; ++n) {
        const int64_t h = n / width, d = n % width;
        const float x = load_as_float(fresh.data, t * fresh.token_stride + h * fresh.head_stride + d, fresh.dtype);
        const int64_t at = place(cache, t, h) + d;
        const bool divide = cache.dtype == kFp8 && fresh.dtype != kFp8;
        store_from_float(cache.data, at, cache.dtype, divide ? x / descale.data[h * descale.head_stride] : x);
      }
    }
  }
};

TEST(AppendSlots, WritesTheRowsAndNothingElse) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Slots want(seed), got(seed);
    want.write(want.p.k_new, want.p.k_cache, want.p.head_dim, want.p.k_descale);
    want.write(want.p.v_new, want.p.v_cache, want.p.head_dim_v, want.p.v_descale);
    ASSERT_EQ(flashspark_append_kv(&got.p), FLASHSPARK_OK) << flashspark_last_error();
    ASSERT_EQ(got.k_cache, want.k_cache) << seed;
    ASSERT_EQ(got.v_cache, want.v_cache) << seed;
  }
}

constexpr int64_t kPositions = 50;

// Gives a problem rotary embedding of k and of a q with twice the heads: rows of cos and sin side by side in one table,
// as vLLM's cos_sin_cache has them.
void turn(Slots &f) {
  f.positions.resize(f.slots.size());
  for (int64_t &position : f.positions) position = f.from(0, kPositions - 1);
  f.p.rotary_positions = f.positions.data();
  f.p.rotary_dim = 8, f.p.seqlen_rotary = kPositions, f.p.rotary_dtype = kF32, f.p.rotary_stride = 8;
  f.p.rotary_interleaved = f.slots.size() % 2;
  f.table.resize(kPositions * 8);
  for (int64_t n = 0; n < kPositions * 4; ++n) {
    const double angle = static_cast<double>(n / 4) / std::pow(10.0, n % 4);
    f.table[n / 4 * 8 + n % 4] = static_cast<float>(std::cos(angle));
    f.table[n / 4 * 8 + 4 + n % 4] = static_cast<float>(std::sin(angle));
  }
  f.p.rotary_cos = f.table.data();
  f.p.rotary_sin = f.table.data() + 4;
  f.p.num_heads_q = 2 * f.p.num_heads_kv;
  f.p.total_q = f.p.total_new;
  f.fill(f.q, f.p.total_new * f.p.num_heads_q * f.p.head_dim, kF32);
  f.p.q = {f.q.data(), 0, f.p.num_heads_q * f.p.head_dim, f.p.head_dim, kF32, 0};
}

// The first eight numbers of a row, turned by the formula.
std::array<double, 8> turned(const Slots &f, const flashspark_tensor &rows, size_t t, int64_t h) {
  std::array<double, 8> x{};
  for (int64_t d = 0; d < 8; ++d) {
    x[d] = load_as_float(rows.data, static_cast<int64_t>(t) * rows.token_stride + h * rows.head_stride + d, rows.dtype);
  }
  std::array<double, 8> y{};
  for (int64_t n = 0; n < 4; ++n) {
    const int64_t first = f.p.rotary_interleaved ? 2 * n : n, second = f.p.rotary_interleaved ? first + 1 : n + 4;
    const double angle = static_cast<double>(f.positions[t]) / std::pow(10.0, n);
    y[first] = x[first] * std::cos(angle) - x[second] * std::sin(angle);
    y[second] = x[first] * std::sin(angle) + x[second] * std::cos(angle);
  }
  return y;
}

// Keys turn by their own positions, and so does q, also where no slot takes the key: another rank stores that.
TEST(AppendSlots, RowsTurnByTheirPositions) {
  for (uint64_t seed = 0; seed < 120; ++seed) {
    Slots f(seed);
    if (f.p.k_new.dtype == kFp8) continue;
    turn(f);
    const auto q_before = f.q;
    ASSERT_EQ(flashspark_append_kv(&f.p), FLASHSPARK_OK) << flashspark_last_error();
    const double step = f.p.k_cache.dtype == kFp8 ? 0.07 : f.p.k_cache.dtype == kF32 ? 1e-5 : 0.005;
    for (size_t t = 0; t < f.slots.size(); ++t) {
      for (int64_t h = 0; h < f.p.num_heads_kv && f.slots[t] >= 0; ++h) {
        const auto want = turned(f, f.p.k_new, t, h);
        const flashspark_tensor &cache = f.p.k_cache;
        const int64_t at = f.place(cache, t, h);
        for (int64_t d = 0; d < 8; ++d) {
          const double scale = cache.dtype == kFp8 ? f.scale[h] : 1;
          const double got = load_as_float(cache.data, at + d, cache.dtype) * scale;
          ASSERT_NEAR(got, want[d], step * std::fabs(want[d]) + 0.005 * (cache.dtype == kFp8 ? scale : 1e-3)) << seed;
        }
      }
      flashspark_tensor before = f.p.q;
      before.data = const_cast<unsigned char *>(q_before.data());
      for (int64_t h = 0; h < f.p.num_heads_q; ++h) {
        const auto want = turned(f, before, t, h);
        for (int64_t d = 0; d < f.p.head_dim; ++d) {
          const auto at = static_cast<int64_t>(t) * before.token_stride + h * before.head_stride + d;
          const double x = load_as_float(f.q.data(), at, kF32);
          ASSERT_NEAR(x, d < 8 ? want[d] : load_as_float(q_before.data(), at, kF32), 1e-5) << seed;
        }
      }
    }
  }
}

TEST(AppendSlots, NoRowsOrPaddingAloneTouchNothing) {
  Slots f(0);
  const auto before = f.k_cache;
  std::fill(f.slots.begin(), f.slots.end(), -1);
  EXPECT_EQ(flashspark_append_kv(&f.p), FLASHSPARK_OK) << flashspark_last_error();
  f.p.total_new = 0;
  f.p.k_new.data = f.p.v_new.data = nullptr;
  EXPECT_EQ(flashspark_append_kv(&f.p), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_EQ(f.k_cache, before);
}

TEST(AppendSlots, WhatIsWrongIsNamed) {
  static const int32_t number = 0;
  static const float table[64] = {};
  const std::pair<std::function<void(Slots &)>, const char *> faults[] = {
      {[](Slots &f) { f.p.seqlens = &number; }, "seqlens = given"},
      {[](Slots &f) { f.p.cu_seqlens_new = &number; }, "cu_seqlens_new = given"},
      {[](Slots &f) { f.p.kv_batch_index = &number; }, "kv_batch_index = given"},
      {[](Slots &f) { f.p.page_table = &number; }, "page_table = given"},
      {[](Slots &f) {
         f.p.rotary_cos = f.p.rotary_sin = table;
         f.p.rotary_dim = 2, f.p.seqlen_rotary = 64, f.p.rotary_dtype = kF32;
       },
       "rotary_positions = NULL"},
      {[](Slots &f) { f.p.rotary_positions = f.slots.data(); }, "rotary_positions = given"},
      {[](Slots &f) {
         turn(f);
         f.p.rotary_stride = f.p.rotary_dim / 2 - 1;
       },
       "rotary_stride = 3: must be 0 or at least rotary_dim / 2 = 4"},
      {[](Slots &f) {
         turn(f);
         f.slots[1] = 0;
         f.positions[1] = kPositions;
       },
       "rotary_positions[1] = 50: must be from 0 to 49"},
      {[](Slots &f) {
         turn(f);
         f.positions[0] = -1;  // of q, whatever the slot
         f.slots[0] = -1;
       },
       "rotary_positions[0] = -1"},
      {[](Slots &f) { f.p.num_seqs = 2; }, "num_seqs = 2"},
      {[](Slots &f) { turn(f), f.p.total_q = f.p.total_new - 1; }, "total_q = "},
      {[](Slots &f) { turn(f), f.p.rotary_seqlens = &number; }, "rotary_seqlens = given"},
      {[](Slots &f) { turn(f), f.p.cu_seqlens_q = &number; }, "cu_seqlens_q = given"},
      {[](Slots &f) { turn(f), f.p.seqused_q = &number; }, "seqused_q = given"},
      {[](Slots &f) { f.p.page_size = 0; }, "page_size = 0"},
      {[](Slots &f) { f.p.num_pages = -1; }, "num_pages = -1"},
      {[](Slots &f) { f.p.num_pages = INT32_MAX, f.p.page_size = 2; }, "num_pages = 2147483647: must be at most 1073"},
      {[](Slots &f) { f.slots[0] = f.p.num_pages * f.p.page_size; }, "slot_mapping[0] = "},
      {[](Slots &f) { f.slots[1] = INT64_MAX; }, "slot_mapping[1] = 9223372036854775807"},
      {[](Slots &f) { f.p.slot_mapping = reinterpret_cast<int64_t *>(&f.k_new[4]); }, "slot_mapping = 0x"},
      {[](Slots &f) { f.p.total_new = -1; }, "total_new = -1"},
  };
  for (const auto &[plant, text] : faults) {
    Slots f(6);
    ASSERT_GE(f.slots.size(), 2u);
    const auto before = f.k_cache;
    plant(f);
    EXPECT_EQ(flashspark_append_kv(&f.p), FLASHSPARK_INVALID_ARGUMENT) << text;
    EXPECT_EQ(std::string(flashspark_last_error()).rfind(text, 0), 0u) << flashspark_last_error() << "\nnot " << text;
    EXPECT_EQ(f.k_cache, before);
  }
}

}  // namespace
}  // namespace flashspark::test
