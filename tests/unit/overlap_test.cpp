// Results and caches that share memory with what is read: refused where numbers would be wrong, right where allowed.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "flashspark/flashspark.h"

namespace flashspark {
namespace {

using Floats = std::vector<float>;

Floats numbers(size_t count) {
  std::mt19937 rng(5);
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float &x : values) x = normal(rng);
  return values;
}

// Two sequences of 40 tokens; q, k, v, out and lse are views that a test may move.
struct Call {
  int64_t heads = 4, heads_kv = 2, width = 16, tokens = 40, rows = 40;
  Floats memory = numbers(1 << 16);
  flashspark_attention_params p;

  Call() {
    flashspark_attention_params_init(&p);
    p.num_seqs = 2;
    p.num_heads_q = heads;
    p.num_heads_kv = heads_kv;
    p.head_dim = p.head_dim_v = width;
    p.max_seqlen_q = p.max_seqlen_k = tokens;
    p.causal = 1;
    p.q = dense(0, heads);
    p.k = dense(8192, heads_kv);
    p.v = dense(16384, heads_kv);
    p.out = dense(24576, heads);
    p.lse = &memory[32768];
    p.lse_batch_stride = heads * tokens;
    p.lse_head_stride = tokens;
    p.lse_token_stride = 1;
  }
  flashspark_tensor at(int64_t first, int64_t batch, int64_t token, int64_t head) {
    return {&memory[first], batch, token, head, FLASHSPARK_FLOAT32, 0};
  }
  flashspark_tensor dense(int64_t first, int64_t h) { return at(first, tokens * h * width, h * width, width); }

  // k and v where no wide q reaches.
  void away() {
    p.k = dense(40000, heads_kv);
    p.v = dense(44000, heads_kv);
  }
  void biased() {
    p.rel_logits = &memory[50000];
    p.rel_dtype = FLASHSPARK_FLOAT32;
    p.rel_extent = p.rel_head_stride = 4;
    p.rel_token_stride = 4 * heads;
  }

  Floats result() {
    EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_OK) << flashspark_last_error();
    Floats results;
    const auto *out = static_cast<const float *>(p.out.data);
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t row = b * p.out.batch_stride + i * p.out.token_stride + h * p.out.head_stride;
          results.insert(results.end(), out + row, out + row + p.head_dim_v);
        }
      }
    }
    return results;
  }
};

using Move = std::function<void(Call &)>;

TEST(Overlap, SharedElementsAreRefused) {
  const struct {
    const char *name, *other;
    Move move;
  } faults[] = {
      {"out", "k", [](Call &c) { c.p.out = c.dense(8192, c.heads); }},
      {"out", "v", [](Call &c) { c.p.out = c.dense(16384, c.heads); }},
      {"out", "v", [](Call &c) { c.p.out = c.dense(16384 + 2 * 40 * 32 - 1, c.heads); }},
      {"out", "q", [](Call &c) { c.p.out = c.dense(16, c.heads); }},
      {"out", "q", [](Call &c) { c.p.out = c.dense(64 * 40, c.heads); }},
      // The same place in another order, type or width.
      {"out", "q", [](Call &c) { c.p.out = c.at(0, 64 * 40, 16, 640); }},
      {"out", "q", [](Call &c) { c.p.out.data = c.p.q.data, c.p.out.dtype = FLASHSPARK_BFLOAT16; }},
      {"out", "q", [](Call &c) { c.p.out.data = c.p.q.data, c.p.head_dim_v = 8; }},
      {"out", "q", [](Call &c) { c.p.out = c.at(64 * 79, -64 * 40, -64, 16); }},
      // Slices of one tensor that meet: of each head's 48 numbers, q has 0 to 15 and out 8 to 23, or 40 to 55.
      {"out", "q", [](Call &c) { c.p.q = c.at(0, 7680, 192, 48), c.p.out = c.at(8, 7680, 192, 48), c.away(); }},
      {"out", "q", [](Call &c) { c.p.q = c.at(0, 7680, 192, 48), c.p.out = c.at(40, 7680, 192, 48), c.away(); }},
      {"out", "rel_logits", [](Call &c) { c.biased(), c.p.rel_logits = c.p.out.data; }},
      {"lse", "q", [](Call &c) { c.p.lse = &c.memory[100]; }},
      {"lse", "k", [](Call &c) { c.p.lse = &c.memory[8192]; }},
      {"lse", "v", [](Call &c) { c.p.lse = &c.memory[16384 + 7]; }},
      {"lse", "out", [](Call &c) { c.p.lse = &c.memory[24576 + 5119]; }},
      {"lse", "rel_logits", [](Call &c) { c.biased(), c.p.lse = &c.memory[50001]; }},
  };
  for (size_t n = 0; n < std::size(faults); ++n) {
    Call c;
    faults[n].move(c);
    const Floats before = c.memory;
    EXPECT_EQ(flashspark_attention_forward(&c.p), FLASHSPARK_INVALID_ARGUMENT) << n;
    const std::string error = flashspark_last_error();
    EXPECT_EQ(error.rfind(std::string(faults[n].name) + " = [", 0), 0u) << n << ": " << error;
    EXPECT_NE(error.find(std::string("shares memory with ") + faults[n].other + ","), std::string::npos)
        << n << ": " << error;
    EXPECT_EQ(c.memory, before);
  }
}

// Results in the place of q are those in memory of their own, to the last bit, however the work is cut.
TEST(Overlap, OutMayBeQ) {
  for (const char *implementation : {"cpu-engine", "cpu-reference"}) {
    for (const int64_t rows : {1, 3, 40}) {
      for (const int32_t splits : {0, 1, 4}) {
        for (const int32_t threads : {1, 3}) {
          Call apart, in_place;
          for (Call *c : {&apart, &in_place}) {
            c->p.implementation = implementation;
            c->p.max_seqlen_q = rows;
            c->p.num_splits = splits;
            c->p.num_threads = threads;
            c->p.deterministic = splits == 0;
          }
          in_place.p.out = in_place.p.q;
          apart.rows = in_place.rows = rows;
          EXPECT_EQ(apart.result(), in_place.result()) << implementation << rows << splits << threads;
        }
      }
    }
  }
}

// Views that lie between each other and share no element.
TEST(Overlap, InterleavedSlicesAreAllowed) {
  const Move layouts[] = {
      // One row a token: q, k, v, out.
      [](Call &c) {
        const int64_t row = 64 + 32 + 32 + 64, batch = 40 * row;
        c.p.q = c.at(0, batch, row, 16), c.p.k = c.at(64, batch, row, 16);
        c.p.v = c.at(96, batch, row, 16), c.p.out = c.at(128, batch, row, 16);
      },
      // The same with rows for other users between, and sequences backwards.
      [](Call &c) {
        const int64_t row = 200, batch = 41 * row;
        c.p.q = c.at(batch, -batch, row, 16), c.p.k = c.at(batch + 64, -batch, row, 16);
        c.p.v = c.at(batch + 96, -batch, row, 16), c.p.out = c.at(batch + 128, -batch, row, 16);
      },
      // Heads of q and out in turns, tokens outside and inside.
      [](Call &c) { c.p.q = c.at(0, 40 * 128, 128, 32), c.p.out = c.at(16, 40 * 128, 128, 32), c.away(); },
      [](Call &c) { c.p.q = c.at(16, 5120, 32, 1280), c.p.out = c.at(0, 5120, 32, 1280), c.away(); },
      // Tokens of q and out in turns, by different batch strides.
      [](Call &c) { c.p.q = c.at(0, 40 * 128, 128, 16), c.p.out = c.at(64, 60 * 128, 128, 16), c.away(); },
      // Two tensors one behind the other.
      [](Call &c) { c.p.out = c.dense(2 * 40 * 64, c.heads), c.away(); },
      // lse beside the rows of out.
      [](Call &c) {
        c.p.out = c.at(24576, 40 * 80, 80, 16), c.p.lse = &c.memory[24576 + 64];
        c.p.lse_batch_stride = 40 * 80, c.p.lse_token_stride = 80, c.p.lse_head_stride = 4;
      },
  };
  for (size_t n = 0; n < std::size(layouts); ++n) {
    Call c;
    layouts[n](c);
    Call apart;
    apart.memory = c.memory;
    layouts[n](apart);
    apart.p.out = apart.dense(54000, apart.heads);
    apart.p.lse = nullptr;
    EXPECT_EQ(c.result(), apart.result()) << n;
  }
}

// New rows, queries and caches: slices of one projection, and V inside K's rows.
struct Append {
  Floats memory = numbers(1 << 14);
  Floats table = Floats(40 * 8, 0.5f);
  flashspark_append_params p;

  flashspark_tensor at(int64_t first, int64_t batch, int64_t token, int64_t head) {
    return {&memory[first], batch, token, head, FLASHSPARK_FLOAT32, 0};
  }
  Append() {
    flashspark_append_params_init(&p);
    p.num_seqs = p.num_cache_rows = 2;
    p.num_heads_q = 4;
    p.num_heads_kv = 2;
    p.head_dim = p.head_dim_v = 16;
    p.seqlen_new = p.seqlen_q = 3;
    p.seqlen_cache = 20;
    const int64_t row = 64 + 32 + 32;
    p.q = at(0, 3 * row, row, 16), p.k_new = at(64, 3 * row, row, 16), p.v_new = at(96, 3 * row, row, 16);
    p.k_cache = at(4096, 20 * 64, 64, 32), p.v_cache = at(4096 + 16, 20 * 64, 64, 32);
    p.rotary_cos = p.rotary_sin = table.data();
    p.rotary_dtype = FLASHSPARK_FLOAT32;
    p.rotary_dim = 16;
    p.seqlen_rotary = 40;
  }
};

TEST(Overlap, AppendTakesSlicesAndRefusesTheCacheItself) {
  Append right;
  EXPECT_EQ(flashspark_append_kv(&right.p), FLASHSPARK_OK) << flashspark_last_error();
  const std::pair<const char *, std::function<void(Append &)>> faults[] = {
      {"k_new", [](Append &a) { a.p.k_new.data = a.p.k_cache.data; }},
      {"v_new", [](Append &a) { a.p.v_new.data = a.p.k_cache.data; }},
      {"v_new", [](Append &a) { a.p.v_new.data = a.p.v_cache.data; }},
      {"q", [](Append &a) { a.p.q.data = a.p.v_cache.data; }},
      {"q", [](Append &a) { a.p.q.data = &a.memory[4096 + 2 * 20 * 64 - 1]; }},
      {"k_new", [](Append &a) { a.p.k_new.data = a.p.q.data; }},
      {"v_new", [](Append &a) { a.p.v_new = a.at(48, 384, 128, 16); }},
  };
  for (size_t n = 0; n < std::size(faults); ++n) {
    Append a;
    faults[n].second(a);
    const Floats before = a.memory;
    EXPECT_EQ(flashspark_append_kv(&a.p), FLASHSPARK_INVALID_ARGUMENT) << n;
    const std::string error = flashspark_last_error();
    EXPECT_NE(error.find(std::string("shares memory with ") + faults[n].first + ","), std::string::npos) << error;
    EXPECT_EQ(a.memory, before);
  }
}

TEST(Overlap, TwoRowsInOnePlaceAreRefused) {
  const auto refused = [](Append &a, const std::string &text) {
    const Floats before = a.memory;
    EXPECT_EQ(flashspark_append_kv(&a.p), FLASHSPARK_INVALID_ARGUMENT) << text;
    EXPECT_EQ(std::string(flashspark_last_error()).rfind(text, 0), 0u) << flashspark_last_error() << "\nnot " << text;
    EXPECT_EQ(a.memory, before);
  };
  const std::vector<int32_t> index{1, 1};
  std::vector<int32_t> seqlens{4, 6};
  Append dense;
  dense.p.kv_batch_index = index.data();
  dense.p.seqlens = seqlens.data();
  refused(dense, "kv_batch_index = sequences 0 and 1: both append to row 6 of cache sequence 1");
  seqlens[1] = 7;  // side by side in one sequence of the cache
  EXPECT_EQ(flashspark_append_kv(&dense.p), FLASHSPARK_OK) << flashspark_last_error();

  std::vector<int32_t> pages{0, 1, 2, 1};  // both sequences have page 1 second
  Append paged;
  paged.p.page_table = pages.data();
  paged.p.num_pages = 4;
  paged.p.page_size = 10;
  paged.p.num_page_slots = paged.p.page_table_stride = 2;
  paged.p.k_cache.batch_stride = paged.p.v_cache.batch_stride = 10 * 64;
  paged.p.seqlens = seqlens.data();
  seqlens = {8, 7};  // rows 8, 9, 10 and 7, 8, 9: only one reaches page 1
  EXPECT_EQ(flashspark_append_kv(&paged.p), FLASHSPARK_OK) << flashspark_last_error();
  seqlens = {8, 8};
  refused(paged, "page_table = sequences 0 and 1: both append to row 0 of page 1");

  std::vector<int64_t> slots{5, -1, 9, -1, 5, 3}, positions(6, 0);
  Append slotted;
  flashspark_append_params &p = slotted.p;
  p.slot_mapping = slots.data();
  p.rotary_positions = positions.data();
  p.num_seqs = 1, p.total_new = p.total_q = 6, p.num_pages = 4, p.page_size = 10;
  p.k_cache.batch_stride = p.v_cache.batch_stride = 10 * 64;
  refused(slotted, "slot_mapping[4] = 5: is also slot_mapping[0]");
  slots[4] = 6;
  EXPECT_EQ(flashspark_append_kv(&p), FLASHSPARK_OK) << flashspark_last_error();
}

}  // namespace
}  // namespace flashspark
