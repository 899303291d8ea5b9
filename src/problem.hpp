// How the fields of flashspark_attention_params become rows and addresses, for all code of the host. No arithmetic of
// attention is here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "flashspark/flashspark.h"

namespace flashspark {

using Params = flashspark_attention_params;
using BackwardParams = flashspark_attention_backward_params;
using AppendParams = flashspark_append_params;
using BlockMaskParams = flashspark_block_mask_params;

constexpr int64_t kMaxHeadDim = 512;  // of head_dim and head_dim_v

// Elements from one position of rotary_cos to the next.
inline int64_t rotary_stride(const AppendParams &p) {
  return p.rotary_stride != 0 ? p.rotary_stride : p.rotary_dim / 2;
}

inline bool is_paged(const Params &p) {
  return p.page_table != nullptr;
}
inline bool is_varlen_q(const Params &p) {
  return p.cu_seqlens_q != nullptr;
}
inline bool is_varlen_k(const Params &p) {
  return p.cu_seqlens_k != nullptr;
}
// Batch rows of dense k and v, or rows of page_table.
inline int64_t num_kv_seqs(const Params &p) {
  return p.kv_batch_index != nullptr && p.num_kv_seqs > 0 ? p.num_kv_seqs : p.num_seqs;
}

// One sequence of the batch: its rows in use, with seqused_q and seqused_k applied and without leftpad_k.
struct Sequence {
  int64_t index;     // b
  int64_t seqlen_q;  // Tq
  int64_t seqlen_k;  // Tk
  int64_t q_row;     // first row of q and out (varlen), 0 for dense
  int64_t k_row;     // first row of k and v: varlen offset, or leftpad
  int64_t kv_index;  // batch row of dense k and v, or row of page_table
  bool causal;

  int64_t pos(int64_t i) const { return i + seqlen_k - seqlen_q; }
};

inline Sequence sequence(const Params &p, int64_t b) {
  Sequence s{};
  s.index = b;
  s.kv_index = p.kv_batch_index != nullptr ? p.kv_batch_index[b] : b;
  if (is_varlen_q(p)) {
    s.q_row = p.cu_seqlens_q[b];
    s.seqlen_q = p.cu_seqlens_q[b + 1] - s.q_row;
  } else {
    s.seqlen_q = p.max_seqlen_q;
  }
  if (p.seqused_q != nullptr) s.seqlen_q = p.seqused_q[b];
  if (is_varlen_k(p)) {
    s.k_row = p.cu_seqlens_k[b];
    s.seqlen_k = p.cu_seqlens_k[b + 1] - s.k_row;
  } else {
    s.seqlen_k = p.max_seqlen_k;
  }
  if (p.seqused_k != nullptr) s.seqlen_k = p.seqused_k[b];
  if (p.leftpad_k != nullptr) {
    s.k_row += p.leftpad_k[b];
    s.seqlen_k = std::max<int64_t>(0, s.seqlen_k - p.leftpad_k[b]);
  }
  s.causal = p.causal_per_seq != nullptr ? p.causal_per_seq[b] != 0 : p.causal != 0;
  return s;
}

// One sequence's part of an append: its new rows, and its rows of q in use.
struct AppendSequence {
  int64_t b;
  int64_t rows, new_row;  // new rows, and the first of them in k_new and v_new
  int64_t q_rows, q_row;  // the same of q; 0 without q
  int64_t before;         // keys in the cache before
  int64_t cache_index;    // sequence of a dense cache, or row of page_table
  int64_t position0;      // position by which row 0 is turned
};

inline AppendSequence append_sequence(const AppendParams &p, int64_t b) {
  AppendSequence s{};
  s.b = b;
  s.rows = p.seqlen_new;
  if (p.cu_seqlens_new != nullptr) {
    s.new_row = p.cu_seqlens_new[b];
    s.rows = p.cu_seqlens_new[b + 1] - s.new_row;
  } else if (p.slot_mapping != nullptr) {
    s.rows = p.total_new;
  }
  if (p.q.data != nullptr) {
    s.q_rows = p.slot_mapping != nullptr ? p.total_q : p.seqlen_q;
    if (p.cu_seqlens_q != nullptr) {
      s.q_row = p.cu_seqlens_q[b];
      s.q_rows = p.cu_seqlens_q[b + 1] - s.q_row;
    }
    if (p.seqused_q != nullptr) s.q_rows = p.seqused_q[b];
  }
  if (p.seqlens != nullptr) s.before = p.seqlens[b];
  s.cache_index = p.kv_batch_index != nullptr ? p.kv_batch_index[b] : b;
  s.position0 = p.rotary_seqlens != nullptr ? p.rotary_seqlens[b] : s.before;
  return s;
}

// Element offset of row i, head h in q or out.
inline int64_t q_offset(const Params &p, const flashspark_tensor &t, const Sequence &s, int64_t i, int64_t h) {
  const int64_t batch = is_varlen_q(p) ? 0 : s.index * t.batch_stride;
  return batch + (s.q_row + i) * t.token_stride + h * t.head_stride;
}

// Element offset of key j, KV head h in k or v.
inline int64_t kv_offset(const Params &p, const flashspark_tensor &t, const Sequence &s, int64_t j, int64_t h) {
  const int64_t row = s.k_row + j;
  if (is_paged(p)) {
    const int64_t page = p.page_table[s.kv_index * p.page_table_stride + row / p.page_size];
    return page * t.batch_stride + row % p.page_size * t.token_stride + h * t.head_stride;
  }
  const int64_t batch = is_varlen_k(p) ? 0 : s.kv_index * t.batch_stride;
  return batch + row * t.token_stride + h * t.head_stride;
}

inline int64_t lse_offset(const Params &p, const Sequence &s, int64_t i, int64_t h) {
  const int64_t batch = is_varlen_q(p) ? 0 : s.index * p.lse_batch_stride;
  return batch + h * p.lse_head_stride + (s.q_row + i) * p.lse_token_stride;
}

// Rows of q and out, and of k and v, as (batch, tokens): a page of a paged cache is a batch row.
struct Extents {
  int64_t q_batch, q_tokens, kv_batch, kv_tokens;
};
inline Extents extents_of(const Params &p) {
  const bool varlen = is_varlen_q(p);
  Extents e{varlen ? 1 : p.num_seqs, varlen ? p.total_q : p.max_seqlen_q, 1, p.total_k};
  if (is_paged(p)) {
    e.kv_batch = p.num_pages, e.kv_tokens = p.page_size;
  } else if (!is_varlen_k(p)) {
    e.kv_batch = num_kv_seqs(p), e.kv_tokens = p.max_seqlen_k;
  }
  return e;
}

// Tables of one value a row as tensors whose rows are one element, or rel_extent elements, wide.
inline flashspark_tensor as_lse_tensor(const Params &p, const float *data) {
  return {const_cast<float *>(data), p.lse_batch_stride, p.lse_token_stride, p.lse_head_stride, FLASHSPARK_FLOAT32, 0};
}
inline flashspark_tensor as_rel_tensor(const Params &p, const void *data, int32_t dtype) {
  return {const_cast<void *>(data), 0, p.rel_token_stride, p.rel_head_stride, dtype, 0};
}
// Rows of rel_logits.
inline int64_t rel_tokens(const Params &p) {
  return is_varlen_q(p) ? p.total_q : p.num_seqs * p.max_seqlen_q;
}

// Row of the per-token tables (rel_logits, prefix_ranges): dense q counts b * max_seqlen_q + i.
inline int64_t token_row(const Params &p, const Sequence &s, int64_t i) {
  return (is_varlen_q(p) ? s.q_row : s.index * p.max_seqlen_q) + i;
}

// Blocks of a mask that is made.
inline int64_t query_blocks(const BlockMaskParams &p) {
  return (p.seqlen_q + p.block_size_q - 1) / p.block_size_q;
}
inline int64_t key_blocks(const BlockMaskParams &p) {
  return (p.seqlen_k + p.block_size_k - 1) / p.block_size_k;
}

inline float scale_at(const flashspark_scale &scale, int64_t b, int64_t h, int32_t dtype) {
  if (scale.data == nullptr || dtype != FLASHSPARK_FLOAT8_E4M3) return 1.0f;
  return scale.data[b * scale.batch_stride + h * scale.head_stride];
}

inline float alibi_slope(const Params &p, int64_t b, int64_t h) {
  return p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[b * p.alibi_batch_stride + h];
}

}  // namespace flashspark
