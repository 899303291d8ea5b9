// Fuzzes append_kv: any params struct is either rejected or executed cleanly, in buffers exactly as large as it
// describes.
#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

#include "flashspark/flashspark.h"
#include "stream.hpp"

namespace {

using flashspark::fuzz::Block;
using flashspark::fuzz::Field;
using flashspark::fuzz::Stream;
using P = flashspark_append_params;

#define F(name)                        \
  Field {                              \
    offsetof(P, name), sizeof(P::name) \
  }
#define TENSOR(t) F(t.batch_stride), F(t.token_stride), F(t.head_stride), F(t.dtype)
constexpr Field kFields[] = {
    F(struct_size),    F(abi_version),        F(device),        F(device_index),   F(num_seqs),
    F(check_device),   F(seqlen_q),           F(total_q),       F(num_heads_q),    F(num_heads_kv),
    F(head_dim),       F(head_dim_v),         F(seqlen_new),    F(total_new),      F(seqlen_cache),
    F(num_cache_rows), F(num_pages),          F(page_size),     F(num_page_slots), TENSOR(k_new),
    TENSOR(v_new),     TENSOR(k_cache),       TENSOR(v_cache),  TENSOR(q),         F(page_table_stride),
    F(rotary_dtype),   F(rotary_interleaved), F(seqlen_rotary), F(rotary_dim),     F(q_rotary_per_token),
    F(rotary_stride)};

void bound(int64_t &value, int64_t most, int64_t legal_most) {
  if (value > most && value <= legal_most) value = value % most;
}

P legal_problem(Stream &in, bool paged) {
  P p;
  flashspark_append_params_init(&p);
  p.num_seqs = 1 + in.below(3);
  p.num_heads_kv = 1 + in.below(2);
  p.num_heads_q = 2 * p.num_heads_kv;
  p.head_dim = 8 * (1 + in.below(3));
  p.head_dim_v = 8 * (1 + in.below(3));
  p.seqlen_new = in.below(6);
  p.total_new = p.num_seqs * p.seqlen_new;
  p.seqlen_cache = paged ? 0 : 32;
  p.num_cache_rows = 4;
  p.seqlen_q = in.below(7);
  p.total_q = p.num_seqs * p.seqlen_q;
  p.page_size = paged ? 1 + in.below(20) : 0;
  p.num_pages = paged ? 7 : 0;
  p.num_page_slots = p.page_table_stride = paged ? 2 : 0;
  const int32_t types[][2] = {{1, 1}, {2, 2}, {3, 3}, {1, 4}, {3, 4}, {4, 4}};
  const auto &type = types[in.below(6)];
  const auto tensor = [&](int64_t tokens, int64_t heads, int64_t width, int32_t dtype) {
    return flashspark_tensor{nullptr, tokens * heads * width, heads * width, width, dtype, 0};
  };
  const int64_t rows = paged ? p.page_size : 32;
  p.k_new = tensor(p.seqlen_new, p.num_heads_kv, p.head_dim, type[0]);
  p.v_new = tensor(p.seqlen_new, p.num_heads_kv, p.head_dim_v, type[0]);
  p.q = tensor(p.seqlen_q, p.num_heads_q, p.head_dim, type[0]);
  p.k_cache = tensor(rows, p.num_heads_kv, p.head_dim, type[1]);
  p.v_cache = tensor(rows, p.num_heads_kv, p.head_dim_v, type[1]);
  p.rotary_dtype = FLASHSPARK_FLOAT32;
  p.rotary_dim = 2 * (1 + in.below(p.head_dim / 2));
  p.seqlen_rotary = 40;
  return p;
}

// Allocates every tensor at its exact size. Returns false if one is too large to try.
bool attach(P &p, Block (&blocks)[5]) {
  const bool slots = p.slot_mapping != nullptr;
  const bool varlen = p.cu_seqlens_new != nullptr || slots, paged = p.page_table != nullptr || slots;
  const int64_t batch = varlen ? 1 : p.num_seqs, tokens = varlen ? p.total_new : p.seqlen_new;
  const bool varlen_q = p.cu_seqlens_q != nullptr || slots;
  const int64_t cache_batch = paged ? p.num_pages : p.num_cache_rows,
                cache_tokens = paged ? p.page_size : p.seqlen_cache;
  const auto fit = [&](int n, flashspark_tensor &t, int64_t b, int64_t rows, int64_t heads, int64_t width) {
    if (!blocks[n].fit({b, rows, heads}, {t.batch_stride, t.token_stride, t.head_stride}, width,
                       static_cast<int64_t>(flashspark_dtype_size(t.dtype)))) {
      return false;
    }
    t.data = blocks[n].origin;
    return true;
  };
  return fit(0, p.k_new, batch, tokens, p.num_heads_kv, p.head_dim) &&
         fit(1, p.v_new, batch, tokens, p.num_heads_kv, p.head_dim_v) &&
         fit(2, p.k_cache, cache_batch, cache_tokens, p.num_heads_kv, p.head_dim) &&
         fit(3, p.v_cache, cache_batch, cache_tokens, p.num_heads_kv, p.head_dim_v) &&
         (p.q.data == nullptr ||
          fit(4, p.q, varlen_q ? 1 : p.num_seqs, varlen_q ? p.total_q : p.seqlen_q, p.num_heads_q, p.head_dim));
}

}  // namespace

// attach() sizes the tensors from the struct whether or not it is legal, so one call both validates and, if valid,
// writes.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Stream in(data, size);
  const uint8_t bits = in.raw<uint8_t>();
  const bool slots = bits & 128;
  // slot_mapping excludes all but rotation; half of the slot cases take both
  const uint8_t flavour = slots && bits & 1 ? bits & (4 | 64) : bits;
  const bool paged = flavour & 1, varlen = flavour & 2, rotary = flavour & 4;
  P p = legal_problem(in, paged || slots);
  if (slots) p.num_seqs = 1, p.total_new = p.total_q = p.seqlen_new;
  for (int64_t patches = in.below(5); patches > 0; --patches) {
    kFields[in.below(std::size(kFields))].set(&p, in.number());
  }
  bound(p.num_seqs, 9, INT32_MAX);
  bound(p.num_heads_q, 64, 1 << 16);
  bound(p.num_heads_kv, 64, 1 << 16);
  bound(p.num_page_slots, 64, INT32_MAX);
  bound(p.num_cache_rows, 64, INT32_MAX);
  bound(p.page_table_stride, 256, INT64_MAX / 16);
  bound(p.seqlen_rotary, 4096, INT32_MAX);
  bound(p.rotary_stride, 512, INT64_MAX);
  if (slots) bound(p.total_new, 64, INT32_MAX);
  const int64_t seqs = std::clamp<int64_t>(p.num_seqs, 0, 16);
  std::vector<int32_t> seqlens(seqs), cu(seqs + 1), cu_q(seqs + 1), used_q(seqs), index(seqs), lens(seqs), pages;
  for (int64_t b = 0; b < seqs; ++b) {
    seqlens[b] = static_cast<int32_t>(in.below(28));
    cu[b + 1] = cu[b] + static_cast<int32_t>(in.below(std::clamp<int64_t>(p.seqlen_new, 0, 100) + 1));
    index[b] = static_cast<int32_t>(b);
    cu_q[b + 1] = cu_q[b] + static_cast<int32_t>(in.below(std::clamp<int64_t>(p.seqlen_q, 0, 100) + 1));
    used_q[b] = static_cast<int32_t>(in.below(4));
    lens[b] = static_cast<int32_t>(in.below(36));
  }
  const int64_t table_rows_of_pages = flavour & 16 ? std::clamp<int64_t>(p.num_cache_rows, 0, 64) : seqs;
  pages.resize(std::max<int64_t>(table_rows_of_pages - 1, 0) * std::clamp<int64_t>(p.page_table_stride, 0, 256) +
               std::clamp<int64_t>(p.num_page_slots, 0, 64));
  for (size_t n = 0; n < pages.size(); ++n) pages[n] = static_cast<int32_t>(n % 7);
  for (std::vector<int32_t> *array : {&seqlens, &cu, &cu_q, &used_q, &index, &lens, &pages}) {
    if (!array->empty() && in.below(12) == 1) {
      (*array)[in.below(static_cast<int64_t>(array->size()))] = static_cast<int32_t>(in.number());
    }
  }
  std::vector<int64_t> slot_mapping(std::clamp<int64_t>(p.total_new, 1, 64));
  for (int64_t &slot : slot_mapping) slot = in.below(20) == 1 ? in.number() : in.below(113) - 1;
  p.seqlens = flavour & 8 ? seqlens.data() : nullptr;
  p.cu_seqlens_new = varlen ? cu.data() : nullptr;
  p.kv_batch_index = flavour & 16 ? index.data() : nullptr;
  const uint8_t queries = slots ? 0 : in.raw<uint8_t>();
  p.rotary_seqlens = flavour & 32 && rotary ? lens.data() : nullptr;
  p.cu_seqlens_q = queries & 1 && flavour & 64 ? cu_q.data() : nullptr;
  p.seqused_q = queries & 2 && flavour & 64 ? used_q.data() : nullptr;
  p.q_rotary_per_token = queries >> 2 & 1;
  p.page_table = paged && !pages.empty() ? pages.data() : nullptr;
  if (slots) p.slot_mapping = slot_mapping.data();
  const int64_t half = std::clamp<int64_t>(p.rotary_dim / 2, 1, 256),
                table_rows = std::clamp<int64_t>(p.seqlen_rotary, 0, 4096);
  const int64_t row = p.rotary_stride != 0 ? std::clamp<int64_t>(p.rotary_stride, 1, 512) : half;
  const std::vector<float> table(static_cast<size_t>(table_rows == 0 ? 0 : (table_rows - 1) * row + half), 0.5f);
  std::vector<int64_t> positions(slot_mapping.size());
  for (int64_t &position : positions) position = in.below(20) == 1 ? in.number() : in.below(40);
  const bool missing = bits == 0xFF;  // an omitted pointer must be rejected
  if (slots && rotary && !missing) p.rotary_positions = positions.data();
  if (rotary && !table.empty()) p.rotary_cos = p.rotary_sin = table.data();
  if (rotary && flavour & 64) p.q.data = &p;
  Block blocks[5];
  if (attach(p, blocks)) flashspark_append_kv(&p);
  return 0;
}
