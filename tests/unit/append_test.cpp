// append_kv against a plain model of the cache: a row stands where the table says, everything else is as it was.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>

#include "dtype.hpp"
#include "support/model.hpp"

namespace flashspark::test {
namespace {

constexpr int64_t kHeads = 2, kHeadsQ = 4, kD = 16, kDv = 8, kSlots = 4, kPages = 12, kCacheRows = 5;
constexpr int64_t kPositions = 80;
constexpr float kOld = 0.125f;  // what the cache holds before

struct Setup {
  bool paged = false, varlen = false, batch_index = false, interleaved = false, q_per_token = false;
  bool rotary_lens = false;               // positions of their own
  bool q_varlen = false, q_used = false;  // q: three sequences of other lengths than the new rows'
  int64_t page_size = 16;
  int64_t rotary_dim = 0;  // 0: none
  int32_t new_dtype = FLASHSPARK_FLOAT32, cache_dtype = FLASHSPARK_FLOAT32, rotary_dtype = FLASHSPARK_FLOAT32;
};

struct Store {
  int32_t dtype;
  std::vector<unsigned char> bytes;

  Store(int32_t type, int64_t count) : dtype(type), bytes(count * dtype_size(type)) {}
  float get(int64_t at) const { return load_as_float(bytes.data(), at, dtype); }
  void set(int64_t at, float x) { store_from_float(bytes.data(), at, dtype, x); }
  int64_t size() const { return static_cast<int64_t>(bytes.size() / dtype_size(dtype)); }
  flashspark_tensor tensor(int64_t batch, int64_t token, int64_t head) {
    return {bytes.data(), batch, token, head, dtype, 0};
  }
};

Store random_store(std::mt19937_64 &rng, int32_t dtype, int64_t count) {
  Store s(dtype, count);
  const std::vector<float> values = normal(rng, count, dtype);
  for (int64_t n = 0; n < count; ++n) s.set(n, values[n]);
  return s;
}

// Three sequences: rows to add and keys before. Crosses a page border, adds nothing, starts empty.
struct Fixture {
  Setup setup;
  std::mt19937_64 rng{4};
  std::vector<int32_t> rows{3, 0, 5}, before{14, 9, 0}, cu{0, 3, 3, 8}, index{4, 0, 2}, pages;
  std::vector<int32_t> q_rows{4, 4, 4}, cu_q{0, 2, 6, 7}, used_q{2, 1, 0}, rotary_lens{30, 0, 7};
  int64_t max_rows = 5, max_q_rows = 4;
  Store k_new, v_new, q, k_cache, v_cache, cos, sin;
  std::vector<float> k_scale{0.5f, 2, 1, 1, 4, 0.25f}, v_scale{2, 1, 0.5f, 1, 1, 8};
  flashspark_append_params p;

  explicit Fixture(const Setup &s)
      : setup(s),
        k_new(random_store(rng, s.new_dtype, new_rows() * kHeads * kD)),
        v_new(random_store(rng, s.new_dtype, new_rows() * kHeads * kDv)),
        q(random_store(rng, s.new_dtype, 12 * kHeadsQ * kD)),
        k_cache(s.cache_dtype, cache_rows() * kHeads * kD),
        v_cache(s.cache_dtype, cache_rows() * kHeads * kDv),
        cos(s.rotary_dtype, kPositions * std::max<int64_t>(s.rotary_dim / 2, 1)),
        sin(s.rotary_dtype, cos.size()) {
    if (!setup.varlen) rows = {5, 5, 5};
    for (int64_t n = 0; n < k_cache.size(); ++n) k_cache.set(n, kOld);
    for (int64_t n = 0; n < v_cache.size(); ++n) v_cache.set(n, kOld);
    for (int64_t n = 0; n < cos.size(); ++n) {
      cos.set(n, std::cos(0.37f * static_cast<float>(n)));
      sin.set(n, std::sin(0.37f * static_cast<float>(n)));
    }
    flashspark_append_params_init(&p);
    p.num_seqs = 3;
    p.num_heads_kv = kHeads;
    p.head_dim = kD;
    p.head_dim_v = kDv;
    p.seqlen_new = max_rows;
    p.k_new = k_new.tensor(max_rows * kHeads * kD, kHeads * kD, kD);
    p.v_new = v_new.tensor(max_rows * kHeads * kDv, kHeads * kDv, kDv);
    p.seqlens = before.data();
    if (setup.varlen) {
      p.cu_seqlens_new = cu.data();
      p.total_new = 8;
    }
    if (setup.paged) {
      pages.resize(kCacheRows * (kSlots + 1), -77);  // garbage where no key will be
      std::vector<int32_t> order(kPages);
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), rng);
      for (int b = 0; b < 3; ++b) {
        const int64_t first = before[b] / s.page_size, last = (before[b] + 5) / s.page_size;
        for (int64_t n = first; n <= last; ++n) pages[cache_row(b) * (kSlots + 1) + n] = order[4 * b + n];
      }
      p.page_table = pages.data();
      p.page_table_stride = kSlots + 1;
      p.num_page_slots = kSlots;
      p.num_pages = kPages;
      const int64_t page = p.page_size = s.page_size;
      p.k_cache = k_cache.tensor(page * kHeads * kD, kD, page * kD);  // heads outside tokens
      p.v_cache = v_cache.tensor(page * kHeads * kDv, kHeads * kDv, kDv);
    } else {
      p.seqlen_cache = 32;
      p.k_cache = k_cache.tensor(32 * kHeads * kD, kHeads * kD, kD);
      p.v_cache = v_cache.tensor(32 * kHeads * kDv, kHeads * kDv, kDv);
    }
    p.num_cache_rows = kCacheRows;
    if (setup.batch_index) p.kv_batch_index = index.data();
    if (setup.cache_dtype == FLASHSPARK_FLOAT8_E4M3) {
      p.k_descale = {k_scale.data(), kHeads, 1};
      p.v_descale = {v_scale.data(), kHeads, 1};
    }
    if (setup.rotary_dim > 0) {
      p.rotary_cos = cos.bytes.data();
      p.rotary_sin = sin.bytes.data();
      p.rotary_dtype = setup.rotary_dtype;
      p.rotary_dim = setup.rotary_dim;
      p.rotary_interleaved = setup.interleaved;
      p.q_rotary_per_token = setup.q_per_token;
      p.seqlen_rotary = kPositions;
      p.num_heads_q = kHeadsQ;
      p.q = q.tensor(max_q_rows * kHeadsQ * kD, kHeadsQ * kD, kD);
      p.seqlen_q = max_q_rows;
      if (setup.q_varlen) {
        p.cu_seqlens_q = cu_q.data();
        p.total_q = cu_q.back();
        for (int b = 0; b < 3; ++b) q_rows[b] = cu_q[b + 1] - cu_q[b];
      }
      if (setup.q_used) {
        p.seqused_q = used_q.data();
        q_rows = used_q;
      }
      if (setup.rotary_lens) p.rotary_seqlens = rotary_lens.data();
    }
  }
  int64_t new_rows() const { return setup.varlen ? 8 : 15; }
  int64_t cache_rows() const { return setup.paged ? kPages * setup.page_size : kCacheRows * 32; }
  int64_t cache_row(int b) const { return setup.batch_index ? index[b] : b; }
  int64_t position0(int b) const { return setup.rotary_lens ? rotary_lens[b] : before[b]; }
  int64_t q_row(int b, int64_t i) const { return (setup.q_varlen ? cu_q[b] : b * max_q_rows) + i; }
  int64_t new_row(int b, int64_t i) const { return setup.varlen ? cu[b] + i : b * max_rows + i; }

  std::vector<double> turned(const Store &from, int64_t at, int64_t position) const {
    std::vector<double> x(kD);
    for (int64_t d = 0; d < kD; ++d) x[d] = from.get(at + d);
    const int64_t half = setup.rotary_dim / 2;
    for (int64_t n = 0; n < half; ++n) {
      const double c = cos.get(position * half + n), s = sin.get(position * half + n);
      double &a = x[setup.interleaved ? 2 * n : n], &b = x[setup.interleaved ? 2 * n + 1 : half + n];
      std::tie(a, b) = std::pair(a * c - b * s, a * s + b * c);
    }
    return x;
  }
};

// One rounding of the format, plus single-precision arithmetic.
double allowed(int32_t dtype, double x) {
  const double bits = dtype == FLASHSPARK_FLOAT32    ? 22
                      : dtype == FLASHSPARK_FLOAT16  ? 11
                      : dtype == FLASHSPARK_BFLOAT16 ? 8
                                                     : 4;
  return (std::fabs(x) + 0.02) * std::ldexp(1.01, -static_cast<int>(bits)) + 5e-7;
}

class Append : public testing::TestWithParam<std::pair<const char *, Setup>> {};

TEST_P(Append, WritesTheNewRowsAndNothingElse) {
  Fixture f(GetParam().second);
  const Fixture original = f;
  ASSERT_EQ(flashspark_append_kv(&f.p), FLASHSPARK_OK) << flashspark_last_error();
  std::vector<bool> k_written(f.k_cache.size()), v_written(f.v_cache.size()), q_turned(f.q.size());
  for (int b = 0; b < 3; ++b) {
    for (int64_t i = 0; i < f.rows[b]; ++i) {
      const int64_t row = f.before[b] + i;
      const int64_t position = f.position0(b) + i, page = f.setup.page_size;
      const int64_t home = f.setup.paged ? f.pages[f.cache_row(b) * (kSlots + 1) + row / page] : f.cache_row(b);
      const int64_t token = f.setup.paged ? row % page : row;
      for (int64_t h = 0; h < kHeads; ++h) {
        const bool fp8 = f.setup.cache_dtype == FLASHSPARK_FLOAT8_E4M3;
        const double k_scale = fp8 ? f.k_scale[b * kHeads + h] : 1, v_scale = fp8 ? f.v_scale[b * kHeads + h] : 1;
        const auto k_want = original.turned(f.k_new, (f.new_row(b, i) * kHeads + h) * kD, position);
        for (int64_t d = 0; d < kD; ++d) {
          const int64_t at =
              home * f.p.k_cache.batch_stride + token * f.p.k_cache.token_stride + h * f.p.k_cache.head_stride + d;
          const double want = k_want[d] / k_scale;
          ASSERT_NEAR(f.k_cache.get(at), want, allowed(f.setup.cache_dtype, want))
              << "k b=" << b << " i=" << i << " h=" << h << " d=" << d;
          k_written[at] = true;
        }
        for (int64_t d = 0; d < kDv; ++d) {
          const int64_t at =
              home * f.p.v_cache.batch_stride + token * f.p.v_cache.token_stride + h * f.p.v_cache.head_stride + d;
          const double want = f.v_new.get((f.new_row(b, i) * kHeads + h) * kDv + d) / v_scale;
          ASSERT_NEAR(f.v_cache.get(at), want, allowed(f.setup.cache_dtype, want))
              << "v b=" << b << " i=" << i << " h=" << h << " d=" << d;
          v_written[at] = true;
        }
      }
    }
    for (int64_t i = 0; f.setup.rotary_dim > 0 && i < f.q_rows[b]; ++i) {
      for (int64_t h = 0; h < kHeadsQ; ++h) {
        const int64_t at = (f.q_row(b, i) * kHeadsQ + h) * kD;
        const auto want = original.turned(original.q, at, f.position0(b) + (f.setup.q_per_token ? i : 0));
        for (int64_t d = 0; d < kD; ++d) {
          ASSERT_NEAR(f.q.get(at + d), want[d], allowed(f.setup.new_dtype, want[d]))
              << "q b=" << b << " i=" << i << " h=" << h << " d=" << d;
          q_turned[at + d] = true;
        }
      }
    }
  }
  for (int64_t n = 0; n < f.k_cache.size(); ++n) {
    if (k_written[n]) continue;
    ASSERT_EQ(f.k_cache.get(n), kOld) << "k cache " << n;
  }
  for (int64_t n = 0; n < f.v_cache.size(); ++n) {
    if (v_written[n]) continue;
    ASSERT_EQ(f.v_cache.get(n), kOld) << "v cache " << n;
  }
  for (int64_t n = 0; n < f.q.size(); ++n) {
    if (q_turned[n]) continue;
    ASSERT_EQ(f.q.get(n), original.q.get(n)) << "q " << n;
  }
  EXPECT_EQ(f.k_new.bytes, original.k_new.bytes);
}

constexpr int32_t kF16 = FLASHSPARK_FLOAT16, kBf16 = FLASHSPARK_BFLOAT16, kFp8 = FLASHSPARK_FLOAT8_E4M3;
const std::vector<std::pair<const char *, Setup>> kSetups = {
    {"Dense", {}},
    {"DenseBatchIndex", {.batch_index = true}},
    {"DenseVarlen", {.varlen = true}},
    {"Paged", {.paged = true}},
    {"PagedVarlenBf16", {.paged = true, .varlen = true, .new_dtype = kBf16, .cache_dtype = kBf16}},
    {"RotaryHalves", {.rotary_dim = kD}},
    {"RotaryPartInterleavedPaged", {.paged = true, .interleaved = true, .q_per_token = true, .rotary_dim = 6}},
    {"RotaryVarlen", {.varlen = true, .q_per_token = true, .rotary_dim = 10}},
    {"RotaryVarlenQ", {.q_per_token = true, .q_varlen = true, .rotary_dim = 8}},
    {"RotaryVarlenBoth", {.varlen = true, .q_per_token = true, .q_varlen = true, .rotary_dim = 8}},
    {"RotaryVarlenQByFirst", {.paged = true, .varlen = true, .q_varlen = true, .rotary_dim = 8}},
    {"RotaryUsedQ", {.q_per_token = true, .q_used = true, .rotary_dim = 8}},
    {"RotaryUsedVarlenQ",
     {.interleaved = true, .q_per_token = true, .q_varlen = true, .q_used = true, .rotary_dim = 8}},
    {"RotaryLens", {.q_per_token = true, .rotary_lens = true, .rotary_dim = 16}},
    {"RotaryLensByFirst", {.paged = true, .varlen = true, .rotary_lens = true, .q_varlen = true, .rotary_dim = 16}},
    {"PagedBatchIndex", {.paged = true, .batch_index = true}},
    {"Paged7BatchIndexRotary",
     {.paged = true, .batch_index = true, .q_per_token = true, .q_varlen = true, .page_size = 7, .rotary_dim = 16}},
    {"Paged5Varlen", {.paged = true, .varlen = true, .page_size = 5}},
    {"Paged20Bf16", {.paged = true, .page_size = 20, .new_dtype = kBf16, .cache_dtype = kBf16}},
    {"RotaryF16",
     {.paged = true,
      .q_per_token = true,
      .rotary_dim = 16,
      .new_dtype = kF16,
      .cache_dtype = kF16,
      .rotary_dtype = kF16}},
    {"Fp8CacheFromF32", {.paged = true, .cache_dtype = kFp8}},
    {"Fp8CacheFromBf16Rotary",
     {.paged = true, .varlen = true, .rotary_dim = 16, .new_dtype = kBf16, .cache_dtype = kFp8}},
    {"Fp8ToFp8", {.new_dtype = kFp8, .cache_dtype = kFp8}},
};

// fp8 rows are copied as they are: the scale belongs to both.
TEST(AppendFp8, EqualTypesAreCopiedBitForBit) {
  Fixture f({.new_dtype = kFp8, .cache_dtype = kFp8});
  ASSERT_EQ(flashspark_append_kv(&f.p), FLASHSPARK_OK) << flashspark_last_error();
  EXPECT_EQ(std::vector(f.k_cache.bytes.begin() + 14 * kHeads * kD, f.k_cache.bytes.begin() + 19 * kHeads * kD),
            std::vector(f.k_new.bytes.begin(), f.k_new.bytes.begin() + 5 * kHeads * kD));
}

INSTANTIATE_TEST_SUITE_P(Setups, Append, testing::ValuesIn(kSetups.begin(), kSetups.end() - 1),
                         [](const auto &info) { return std::string(info.param.first); });

struct Fault {
  const char *name;
  Setup setup;
  std::function<void(Fixture &)> plant;
  const char *argument;
  flashspark_status status = FLASHSPARK_INVALID_ARGUMENT;
};
void PrintTo(const Fault &fault, std::ostream *os) {
  *os << fault.name;
}

constexpr auto kType = FLASHSPARK_INVALID_TYPE;
const Setup kPagedSetup{.paged = true}, kRotary{.rotary_dim = 16}, kVarlen{.varlen = true};
const Setup kLongQ{.varlen = true, .q_per_token = true, .rotary_dim = 16};  // sequence 1: no new row, four of q
const Setup kLens{.rotary_lens = true, .rotary_dim = 16}, kVarlenQ{.q_varlen = true, .rotary_dim = 16},
    kUsedQ{.q_used = true, .rotary_dim = 16};
const std::vector<Fault> kFaults = {
    {"StructSize",
     {},
     [](Fixture &f) { f.p.struct_size = 4; },
     "flashspark_append_params",
     FLASHSPARK_VERSION_MISMATCH},
    {"Device", {}, [](Fixture &f) { f.p.device = 3; }, "device = 3"},
    {"NumSeqs", {}, [](Fixture &f) { f.p.num_seqs = -1; }, "num_seqs = -1"},
    {"Heads", {}, [](Fixture &f) { f.p.num_heads_kv = 0; }, "num_heads_kv = 0"},
    {"HeadDim", {}, [](Fixture &f) { f.p.head_dim = 513; }, "head_dim = 513"},
    {"HeadDimV", {}, [](Fixture &f) { f.p.head_dim_v = 2000; }, "head_dim_v = 2000"},
    {"SeqlenNew", {}, [](Fixture &f) { f.p.seqlen_new = -1; }, "seqlen_new = -1"},
    {"CacheRows", {}, [](Fixture &f) { f.p.num_cache_rows = 2; }, "num_cache_rows = 2"},
    {"CacheFull", {}, [](Fixture &f) { f.before[2] = 28; }, "seqlens[2] = 28"},
    {"LengthNegative", {}, [](Fixture &f) { f.before[0] = -1; }, "seqlens[0] = -1"},
    {"BatchIndex", {.batch_index = true}, [](Fixture &f) { f.index[1] = 5; }, "kv_batch_index[1] = 5"},
    {"BatchIndexOfPages",
     {.paged = true, .batch_index = true},
     [](Fixture &f) { f.index[0] = -1; },
     "kv_batch_index[0] = -1"},
    {"CheckDevice", {}, [](Fixture &f) { f.p.check_device = 2; }, "check_device = 2"},
    {"CuFalling", kVarlen, [](Fixture &f) { f.cu[1] = -1; }, "cu_seqlens_new[1] = -1"},
    {"CuBeyond", kVarlen, [](Fixture &f) { f.p.total_new = 7; }, "cu_seqlens_new[3] = 8"},
    {"KNewNull", {}, [](Fixture &f) { f.p.k_new.data = nullptr; }, "k_new.data = NULL"},
    {"VCacheNull", {}, [](Fixture &f) { f.p.v_cache.data = nullptr; }, "v_cache.data = NULL"},
    {"CacheOverlap", {}, [](Fixture &f) { f.p.k_cache.token_stride = 8; }, "k_cache.token_stride = 8"},
    {"KNewType", {}, [](Fixture &f) { f.p.k_new.dtype = 9; }, "k_new.dtype", kType},
    {"VNewType", {}, [](Fixture &f) { f.p.v_new.dtype = kBf16; }, "v_new.dtype", kType},
    {"CacheType", {}, [](Fixture &f) { f.p.k_new.dtype = f.p.v_new.dtype = kBf16; }, "k_new.dtype", kType},
    {"PageSize", kPagedSetup, [](Fixture &f) { f.p.page_size = 0; }, "page_size = 0"},
    {"PageSizeWide", kPagedSetup, [](Fixture &f) { f.p.page_size = (1 << 20) + 1; }, "page_size = 1048577"},
    {"PageBeyond", kPagedSetup, [](Fixture &f) { f.pages[1] = kPages; }, "page_table[0,1] = 12"},
    {"SinWithoutCos", kRotary, [](Fixture &f) { f.p.rotary_cos = nullptr; }, "rotary_cos = NULL"},
    {"QWithoutRotary", kRotary, [](Fixture &f) { f.p.rotary_cos = f.p.rotary_sin = nullptr; }, "q = given"},
    {"RotaryDimOdd", kRotary, [](Fixture &f) { f.p.rotary_dim = 5; }, "rotary_dim = 5"},
    {"RotaryDimWide", kRotary, [](Fixture &f) { f.p.rotary_dim = 18; }, "rotary_dim = 18"},
    {"RotaryShort", kRotary, [](Fixture &f) { f.p.seqlen_rotary = 18; }, "seqlen_rotary = 18: must cover position 18"},
    {"RotaryShortForQ", kLongQ,
     [](Fixture &f) {
       f.p.seqlen_rotary = 12;
       f.before = {0, 9, 0};
       f.rows = {1, 0, 1};
       f.cu = {0, 1, 1, 2};
     },
     "seqlen_rotary = 12: must cover position 12"},
    {"LengthNegativeForQ", kLongQ, [](Fixture &f) { f.before[1] = -3; }, "seqlens[1] = -3"},
    {"RotaryLensNegative", kLens, [](Fixture &f) { f.rotary_lens[2] = -1; }, "rotary_seqlens[2] = -1"},
    {"RotaryLensBeyond", kLens, [](Fixture &f) { f.rotary_lens[0] = 76; }, "rotary_seqlens[0] = 76"},
    {"RotaryLensHuge", kLens, [](Fixture &f) { f.rotary_lens[1] = INT32_MAX; }, "rotary_seqlens[1] = 2147483647"},
    {"RotaryLensWithoutTables", kLens,
     [](Fixture &f) {
       f.p.rotary_cos = f.p.rotary_sin = nullptr;
       f.p.q.data = nullptr;
     },
     "rotary_seqlens = given"},
    {"CuQWithoutQ", kVarlenQ, [](Fixture &f) { f.p.q.data = nullptr; }, "cu_seqlens_q = given"},
    {"UsedQWithoutQ", kUsedQ, [](Fixture &f) { f.p.q.data = nullptr; }, "seqused_q = given"},
    {"CuQNegative", kVarlenQ, [](Fixture &f) { f.cu_q[0] = -1; }, "cu_seqlens_q[0] = -1"},
    {"CuQFalling", kVarlenQ, [](Fixture &f) { f.cu_q[2] = 1; }, "cu_seqlens_q[2] = 1"},
    {"CuQBeyond", kVarlenQ, [](Fixture &f) { f.p.total_q = 6; }, "cu_seqlens_q[3] = 7"},
    {"CuQTooLong", kVarlenQ, [](Fixture &f) { f.p.seqlen_q = 3; }, "cu_seqlens_q[2] = 6"},
    {"UsedQTooMany", kUsedQ, [](Fixture &f) { f.used_q[1] = 5; }, "seqused_q[1] = 5"},
    {"UsedQNegative", kUsedQ, [](Fixture &f) { f.used_q[2] = -1; }, "seqused_q[2] = -1"},
    {"UsedQBeyondOffsets",
     {.q_varlen = true, .rotary_dim = 16},
     [](Fixture &f) {
       f.p.seqused_q = f.used_q.data();
       f.used_q = {2, 4, 2};
     },
     "seqused_q[2] = 2"},
    {"SeqlenQ", kRotary, [](Fixture &f) { f.p.seqlen_q = -1; }, "seqlen_q = -1"},
    {"TotalQ", kVarlenQ, [](Fixture &f) { f.p.total_q = int64_t{1} << 31; }, "total_q = 2147483648"},
    {"RotaryType", kRotary, [](Fixture &f) { f.p.rotary_dtype = kFp8; }, "rotary_dtype", kType},
    {"Descale", {.cache_dtype = kFp8}, [](Fixture &f) { f.k_scale[3] = NAN; }, "k_descale[1,1] = nan"},
};

class AppendValidator : public testing::TestWithParam<Fault> {};

TEST_P(AppendValidator, NamesTheArgumentAndWritesNothing) {
  Fixture f(GetParam().setup);
  ASSERT_EQ(flashspark_append_kv(&f.p), FLASHSPARK_OK) << "unbroken: " << flashspark_last_error();
  const Fixture before = f;
  GetParam().plant(f);
  EXPECT_EQ(flashspark_append_kv(&f.p), GetParam().status) << flashspark_last_error();
  const std::string text = flashspark_last_error();
  EXPECT_EQ(text.rfind(GetParam().argument, 0), 0u) << text << "\nexpected it to begin: " << GetParam().argument;
  EXPECT_EQ(f.k_cache.bytes, before.k_cache.bytes);
  EXPECT_EQ(f.v_cache.bytes, before.v_cache.bytes);
  EXPECT_EQ(f.q.bytes, before.q.bytes);
}

INSTANTIATE_TEST_SUITE_P(Faults, AppendValidator, testing::ValuesIn(kFaults),
                         [](const auto &info) { return std::string(info.param.name); });

TEST(AppendDevice, CudaIsRefused) {
  Fixture f({});
  f.p.device = FLASHSPARK_CUDA;
  EXPECT_EQ(flashspark_append_kv(&f.p), FLASHSPARK_UNSUPPORTED);
}

// Rows and cache that run backwards in memory: every offset from `data` is negative.
TEST(Append, NegativeStrides) {
  std::vector<float> fresh(4 * 8), k(6 * 8, kOld), v(6 * 8, kOld);
  std::iota(fresh.begin(), fresh.end(), 1.0f);
  const auto backwards = [](std::vector<float> &x) {
    return flashspark_tensor{x.data() + x.size() - 8, 0, -8, 0, FLASHSPARK_FLOAT32, 0};
  };
  const std::vector<int32_t> before{1};
  flashspark_append_params p;
  flashspark_append_params_init(&p);
  p.num_seqs = p.num_cache_rows = p.num_heads_kv = 1;
  p.head_dim = p.head_dim_v = 8;
  p.seqlen_new = 4;
  p.seqlen_cache = 6;
  p.seqlens = before.data();
  p.k_new = p.v_new = backwards(fresh);
  p.k_cache = backwards(k);
  p.v_cache = backwards(v);
  ASSERT_EQ(flashspark_append_kv(&p), FLASHSPARK_OK) << flashspark_last_error();
  std::vector<float> expected(6 * 8, kOld);
  std::copy(fresh.begin(), fresh.end(), expected.begin() + 8);  // row 1 from the end takes new row 0, and so on
  EXPECT_EQ(k, expected);
  EXPECT_EQ(v, expected);
}

}  // namespace
}  // namespace flashspark::test
