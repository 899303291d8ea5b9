// What the host tells every attention operation about a problem. Plain data; every pointer lies on the device. Fields
// mean what the fields of the same name in flashspark.h mean; strides count elements.
#pragma once

#include <cstdint>

#include "common/divisor.hpp"
#include "common/dtype.hpp"

namespace flashspark {

struct Strides {
  int64_t batch, token, head;
};

// Strides of a paged cache in units of `unit` bytes, a power of two that divides both: the address of a row is then one
// 32-bit sum of products and one multiplication by the unit, where strides in elements take five instructions more.
struct PageSteps {
  int32_t page, slot, unit;
};

// A factor for each sequence and KV head; strides may be 0. NULL: 1.
struct Scale {
  const float *data;
  int64_t seq_stride, head_stride;
};

enum class PrefixMode : int32_t { none, per_seq, per_token };

// Which rows and keys there are, and which keys a row keeps: all that schedulers and the combine kernel need.
struct SequenceArguments {
  // Shape. A "row" is one (query token, query head of the group): row = token * group + head.
  int32_t num_seqs, num_heads_kv, head_dim, head_dim_v;
  int32_t max_seqlen_q, max_seqlen_k;
  Divisor group;      // query heads of a KV head
  Divisor page_size;  // value 0: not paged

  // What exists. Kernels clamp whatever they read on the device to it (attention/sequence.cuh).
  int32_t total_q;                // varlen: rows of q
  int32_t key_rows;               // varlen: rows of k; else rows that a sequence of k, or its pages, has
  int32_t last_batch, last_page;  // the largest that kv_batch_index and page_table may name

  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_q, *seqused_k, *leftpad_k, *kv_batch_index, *page_table;
  int64_t page_table_stride;

  // Mask. Windows are clamped to 2^30; open ones are 2^30.
  int32_t causal;
  int32_t window_left, window_right;
  int32_t attention_chunk;  // 0: off
  const int32_t *causal_per_seq;
  PrefixMode prefix_mode;
  int32_t prefix_clamp_window;
  int32_t num_prefix_ranges;
  const int32_t *prefix_ranges;
  int32_t rswa_window;  // 0: off
  const int32_t *rswa_prefix_lens;
};

// The rest of the problem: tensors and scores.
struct AttentionArguments : SequenceArguments {
  const void *q, *k, *v;
  void *out;
  float *lse;  // NULL: not wanted
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides;
  PageSteps k_pages, v_pages;

  // Of kernels that dequantize K and V: the others have one type for all.
  DType q_dtype, out_dtype;
  Scale q_descale, k_descale, v_descale;  // q's is NULL unless q is e4m3

  float softmax_scale;           // times log2(e) unless the kernel has a score modification
  float softcap;                 // 0: off
  const void *sinks;             // (Hq)
  DType sinks_dtype, rel_dtype;  // not e4m3
  const void *rel_logits;
  int64_t rel_token_stride, rel_head_stride;
  int32_t rel_extent;
  const float *alibi_slopes;
  int64_t alibi_batch_stride;
};

}  // namespace flashspark
