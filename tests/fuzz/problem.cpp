// The fields of flashspark_attention_params, the memory that they imply, and small legal problems to begin with.
#include "problem.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace flashspark::fuzz {
namespace {

#define F(name)                        \
  Field {                              \
    offsetof(P, name), sizeof(P::name) \
  }
#define TENSOR(t) F(t.batch_stride), F(t.token_stride), F(t.head_stride), F(t.dtype)
constexpr Field kFields[] = {F(struct_size),
                             F(abi_version),
                             F(device),
                             F(device_index),
                             F(num_threads),
                             F(num_splits),
                             F(deterministic),
                             F(check_device),
                             F(attention_chunk),
                             F(num_seqs),
                             F(num_heads_q),
                             F(num_heads_kv),
                             F(head_dim),
                             F(head_dim_v),
                             F(max_seqlen_q),
                             F(max_seqlen_k),
                             F(total_q),
                             F(total_k),
                             F(num_pages),
                             F(page_size),
                             F(num_page_slots),
                             F(num_kv_seqs),
                             TENSOR(q),
                             TENSOR(k),
                             TENSOR(v),
                             TENSOR(out),
                             F(page_table_stride),
                             F(softmax_scale),
                             F(softcap),
                             F(q_descale.batch_stride),
                             F(q_descale.head_stride),
                             F(k_descale.batch_stride),
                             F(v_descale.head_stride),
                             F(sinks_dtype),
                             F(rel_dtype),
                             F(rel_extent),
                             F(rel_token_stride),
                             F(rel_head_stride),
                             F(alibi_batch_stride),
                             F(causal),
                             F(prefix_mode),
                             F(window_left),
                             F(window_right),
                             F(num_prefix_ranges),
                             F(prefix_clamp_window),
                             F(rswa_window),
                             F(dropout_p),
                             F(reserved_dropout),
                             F(dropout_seed),
                             F(dropout_offset),
                             F(lse_batch_stride),
                             F(lse_head_stride),
                             F(lse_token_stride)};

// Reduces legal values that would need too much memory; illegal values are kept.
void bound(int64_t &value, int64_t most, int64_t legal_most) {
  if (value > most && value <= legal_most) value = value % most;
}

void shrink_to_memory(P &p) {
  bound(p.num_seqs, 9, INT32_MAX);
  bound(p.num_heads_q, 64, 1 << 16);
  bound(p.num_heads_kv, 64, 1 << 16);
  bound(p.num_page_slots, 64, INT32_MAX);
  bound(p.page_table_stride, 256, INT64_MAX / 16);
  bound(p.alibi_batch_stride, 128, int64_t{1} << 30);
  bound(p.num_prefix_ranges, 16, 1 << 24);
  bound(p.num_kv_seqs, 16, INT32_MAX);
  if (p.num_threads > 2 && p.num_threads <= 1024) p.num_threads = 1 + p.num_threads % 2;
  for (flashspark_scale *s : {&p.q_descale, &p.k_descale, &p.v_descale}) {
    s->batch_stride &= 15;
    s->head_stride &= 15;
  }
}

template <class T>
T *data_or_null(std::vector<T> &values) {
  return values.empty() ? nullptr : values.data();
}

int64_t clamped(int64_t value, int64_t most) {
  return std::clamp<int64_t>(value, 0, most);
}

// Allocates the metadata arrays that the struct implies, at first with lengths that stay within the tensors.
void fill_arrays(P &p, Arrays &a, Stream &in) {
  const int64_t seqs = clamped(p.num_seqs, 16), heads_q = clamped(p.num_heads_q, 64),
                heads_kv = clamped(p.num_heads_kv, 64);
  const uint16_t wanted = in.raw<uint16_t>();
  const auto lengths = [&](int bit, int64_t count, int64_t most) {
    std::vector<int32_t> values;
    if (!(wanted >> bit & 1)) return values;
    for (int64_t n = 0; n < count; ++n) values.push_back(static_cast<int32_t>(in.below(clamped(most, 100) + 1)));
    return values;
  };
  const auto offsets = [&](int bit, int64_t longest, int64_t total) {
    std::vector<int32_t> values;
    if (!(wanted >> bit & 1)) return values;
    values.push_back(0);
    for (int64_t b = 0; b < seqs; ++b) {
      const int64_t room = std::min(clamped(longest, 1000), std::max<int64_t>(clamped(total, 1000) - values.back(), 0));
      values.push_back(values.back() + static_cast<int32_t>(in.below(room + 1)));
    }
    return values;
  };
  a.cu_q = offsets(0, p.max_seqlen_q, p.total_q);
  const bool paged = wanted >> 1 & 1;
  if (!paged) a.cu_k = offsets(2, p.max_seqlen_k, p.total_k);
  a.used_q = lengths(3, seqs, p.max_seqlen_q);
  if (paged ? !(wanted >> 15 & 1) : (wanted >> 4 & 1)) {
    for (int64_t b = 0; b < seqs; ++b) {
      const int64_t room = paged ? clamped(p.num_page_slots, 64) * clamped(p.page_size, 64) : p.max_seqlen_k;
      a.used_k.push_back(static_cast<int32_t>(in.below(clamped(room, 200) + 1)));
    }
  }
  if (a.cu_k.empty()) a.leftpad = lengths(5, seqs, 6);
  if (a.cu_k.empty()) a.kv_index = lengths(6, seqs, std::max<int64_t>(p.num_kv_seqs, 1) - 1);
  a.causal = lengths(7, seqs, 1);
  a.prefix_lens = lengths(8, seqs, 40);
  if (paged) {
    const int64_t rows = a.kv_index.empty() || p.num_kv_seqs == 0 ? seqs : clamped(p.num_kv_seqs, 16);
    a.pages.resize(std::max<int64_t>((rows - 1) * clamped(p.page_table_stride, 256), 0) +
                   clamped(p.num_page_slots, 64) + 1);
    for (int32_t &page : a.pages)
      page = static_cast<int32_t>(in.below(std::max<int64_t>(clamped(p.num_pages, 100), 1)));
  }
  const int64_t tokens =
      p.cu_seqlens_q != nullptr || !a.cu_q.empty() ? p.total_q : seqs * clamped(p.max_seqlen_q, 4096);
  if (p.prefix_mode == FLASHSPARK_PREFIX_PER_SEQ) a.ranges.resize(2 * seqs * clamped(p.num_prefix_ranges, 16));
  if (p.prefix_mode == FLASHSPARK_PREFIX_PER_TOKEN) a.ranges.resize(2 * clamped(tokens, 1 << 16));
  for (int32_t &x : a.ranges) x = static_cast<int32_t>(in.below(60)) - 1;
  if (wanted >> 9 & 1) a.sinks.assign(heads_q, 0.5f);
  if (wanted >> 10 & 1)
    a.alibi.assign(std::max<int64_t>((seqs - 1) * clamped(p.alibi_batch_stride, 128), 0) + heads_q, 0.25f);
  const auto scales = [&](int bit, const flashspark_scale &s) {
    const int64_t count =
        std::max<int64_t>(seqs - 1, 0) * s.batch_stride + std::max<int64_t>(heads_kv - 1, 0) * s.head_stride + 1;
    return std::vector<float>(wanted >> bit & 1 ? count : 0, 1.5f);
  };
  a.q_scale = scales(11, p.q_descale);
  a.k_scale = scales(12, p.k_descale);
  a.v_scale = scales(13, p.v_descale);
  // Corrupts any entry of any length array.
  for (std::vector<int32_t> *array :
       {&a.cu_q, &a.cu_k, &a.used_q, &a.used_k, &a.leftpad, &a.kv_index, &a.pages, &a.causal}) {
    if (!array->empty() && in.below(16) == 1)
      (*array)[in.below(static_cast<int64_t>(array->size()))] = static_cast<int32_t>(in.number());
  }
  p.cu_seqlens_q = data_or_null(a.cu_q);
  p.cu_seqlens_k = data_or_null(a.cu_k);
  p.seqused_q = data_or_null(a.used_q);
  p.seqused_k = data_or_null(a.used_k);
  p.leftpad_k = data_or_null(a.leftpad);
  p.kv_batch_index = data_or_null(a.kv_index);
  p.page_table = data_or_null(a.pages);
  p.causal_per_seq = data_or_null(a.causal);
  p.prefix_ranges = data_or_null(a.ranges);
  p.rswa_prefix_lens = data_or_null(a.prefix_lens);
  p.sinks = data_or_null(a.sinks);
  p.alibi_slopes = data_or_null(a.alibi);
  p.q_descale.data = data_or_null(a.q_scale);
  p.k_descale.data = data_or_null(a.k_scale);
  p.v_descale.data = data_or_null(a.v_scale);
  p.output_scale = wanted >> 14 & 1 ? a.output_scale.data() : nullptr;
}

P legal_problem(Stream &in) {
  P p;
  flashspark_attention_params_init(&p);
  const uint8_t shape = in.raw<uint8_t>();
  p.num_seqs = 1 + shape % 3;
  p.num_heads_kv = 1 + shape / 3 % 2;
  p.num_heads_q = p.num_heads_kv * (1 + shape / 6 % 3);
  p.head_dim = 8 * (1 + in.below(5));
  p.head_dim_v = in.below(2) ? p.head_dim : 8 * (1 + in.below(5));
  p.max_seqlen_q = in.below(9);
  p.max_seqlen_k = in.below(50);
  p.total_q = p.max_seqlen_q * p.num_seqs;
  p.total_k = p.max_seqlen_k * p.num_seqs;
  const int32_t dtypes[][2] = {{1, 1}, {2, 2}, {3, 3}, {2, 4}, {3, 4}, {4, 4}};
  const auto &pair = dtypes[in.below(6)];
  const int32_t out_dtype = 1 + static_cast<int32_t>(in.below(4));
  p.q = {nullptr, p.max_seqlen_q * p.num_heads_q * p.head_dim, p.num_heads_q * p.head_dim, p.head_dim, pair[0], 0};
  p.k = {nullptr, p.max_seqlen_k * p.num_heads_kv * p.head_dim, p.num_heads_kv * p.head_dim, p.head_dim, pair[1], 0};
  p.v = {nullptr, p.max_seqlen_k * p.num_heads_kv * p.head_dim_v, p.num_heads_kv * p.head_dim_v, p.head_dim_v, pair[1],
         0};
  p.out = {
      nullptr, p.max_seqlen_q * p.num_heads_q * p.head_dim_v, p.num_heads_q * p.head_dim_v, p.head_dim_v, out_dtype, 0};
  p.lse_batch_stride = p.num_heads_q * p.max_seqlen_q;
  p.lse_head_stride = p.total_q;
  p.lse_token_stride = 1;
  p.page_size = 0;
  p.sinks_dtype = p.rel_dtype = FLASHSPARK_FLOAT32;
  p.rel_extent = 4;
  p.rel_head_stride = 4;
  p.rel_token_stride = 4 * p.num_heads_q;
  p.num_threads = 1;
  p.page_table_stride = p.num_page_slots = 3;
  return p;
}

void page(P &p, Stream &in) {
  p.page_size = in.below(2) ? 16 : 1 + in.below(24);
  p.num_pages = 5;
  p.k.batch_stride = p.page_size * p.k.token_stride;
  p.v.batch_stride = p.page_size * p.v.token_stride;
  p.max_seqlen_k = in.below(p.num_page_slots * p.page_size + 1);
}

}  // namespace

Attention::Attention(Stream &in) : params(legal_problem(in)) {
  P &p = params;
  const uint8_t flavour = in.raw<uint8_t>();
  if (flavour & 1) page(p, in);
  if (flavour & 64) p.dropout_p = 0.5f;
  for (int64_t patches = in.below(6); patches > 0; --patches) {
    const Field &field = kFields[in.below(std::size(kFields))];
    field.set(&p, in.number());
  }
  shrink_to_memory(p);
  fill_arrays(p, arrays, in);
  p.dropout_state = flavour & 128 ? arrays.dropout_state.data() : nullptr;
  for (uintptr_t n = 0; flashspark_tensor * t : {&p.q, &p.k, &p.v, &p.out}) t->data = nowhere(n++);
  if (flavour & 2 && flavour & 4 && flavour & 8) p.q.data = static_cast<char *>(p.q.data) + 1;
  p.lse = flavour & 16 ? static_cast<float *>(nowhere(4)) : nullptr;
  p.rel_logits = flavour & 32 ? nowhere(5) : nullptr;
}

void complain(const char *what) {
  std::fprintf(stderr, "%s: %s\n", what, flashspark_last_error());
  std::abort();
}

bool attach(P &p, Block (&blocks)[6]) {
  const bool varlen_q = p.cu_seqlens_q != nullptr, varlen_k = p.cu_seqlens_k != nullptr,
             paged = p.page_table != nullptr;
  const int64_t q_batch = varlen_q ? 1 : p.num_seqs, q_tokens = varlen_q ? p.total_q : p.max_seqlen_q;
  const int64_t rows = p.kv_batch_index != nullptr && p.num_kv_seqs > 0 ? p.num_kv_seqs : p.num_seqs;
  const int64_t k_batch = paged ? p.num_pages : varlen_k ? 1 : rows;
  const int64_t k_tokens = paged ? p.page_size : varlen_k ? p.total_k : p.max_seqlen_k;
  const auto fit = [&](int n, flashspark_tensor &t, int64_t batch, int64_t tokens, int64_t heads, int64_t width) {
    if (!blocks[n].fit({batch, tokens, heads}, {t.batch_stride, t.token_stride, t.head_stride}, width,
                       static_cast<int64_t>(flashspark_dtype_size(t.dtype)))) {
      return false;
    }
    t.data = blocks[n].origin;
    return true;
  };
  flashspark_tensor lse{nullptr, p.lse_batch_stride, p.lse_token_stride, p.lse_head_stride, FLASHSPARK_FLOAT32, 0};
  flashspark_tensor rel{nullptr, 0, p.rel_token_stride, p.rel_head_stride, p.rel_dtype, 0};
  if (!fit(0, p.q, q_batch, q_tokens, p.num_heads_q, p.head_dim) ||
      !fit(1, p.k, k_batch, k_tokens, p.num_heads_kv, p.head_dim) ||
      !fit(2, p.v, k_batch, k_tokens, p.num_heads_kv, p.head_dim_v) ||
      !fit(3, p.out, q_batch, q_tokens, p.num_heads_q, p.head_dim_v)) {
    return false;
  }
  if (p.lse != nullptr) {
    if (!fit(4, lse, q_batch, q_tokens, p.num_heads_q, 1)) return false;
    p.lse = static_cast<float *>(lse.data);
  }
  if (p.rel_logits != nullptr) {
    if (!fit(5, rel, 1, q_batch * q_tokens, p.num_heads_q, p.rel_extent)) return false;
    p.rel_logits = rel.data;
  }
  return true;
}

double work(const P &p) {
  const double keys = p.page_table != nullptr ? static_cast<double>(p.num_page_slots) * p.page_size
                      : p.cu_seqlens_k        ? p.total_k
                                              : p.max_seqlen_k;
  return static_cast<double>(p.num_seqs) * p.max_seqlen_q * p.num_heads_q * keys * (p.head_dim + p.head_dim_v);
}

}  // namespace flashspark::fuzz
