// What the host hands to the append kernel. Fields mean what the fields of the same name in flashspark_append_params
// mean; every pointer lies on the device, strides count elements.
#pragma once

#include "attention/arguments.hpp"

namespace flashspark {

struct AppendArguments {
  const void *k_new, *v_new;
  void *k_cache, *v_cache;
  void *q;  // NULL: not turned
  Strides k_new_strides, v_new_strides, k_cache_strides, v_cache_strides, q_strides;
  DType new_dtype, cache_dtype, q_dtype, rotary_dtype;

  int32_t num_seqs, num_heads_q, num_heads_kv, head_dim, head_dim_v;
  int32_t new_rows;              // CTAs; those of the rows of q come behind them
  Divisor seqlen_new, seqlen_q;  // dense: rows of a sequence
  int32_t capacity;              // rows of a sequence of the cache; with slot_mapping: of the whole cache
  int32_t cache_rows;            // sequences of a dense cache, or rows of page_table
  int32_t cache_batches;         // pages, or sequences of the cache
  Divisor page_size;             // value 0: not paged

  const int32_t *seqlens, *cu_seqlens_new, *cu_seqlens_q, *seqused_q, *kv_batch_index, *rotary_seqlens, *page_table;
  int64_t page_table_stride;
  const int64_t *slot_mapping;
  Scale k_descale, v_descale;  // NULL unless the cache is e4m3 and the new rows are not

  const void *rotary_cos, *rotary_sin;
  const int64_t *rotary_positions;
  int64_t rotary_stride;
  int32_t rotary_interleaved, rotary_dim, seqlen_rotary, q_rotary_per_token;
};

}  // namespace flashspark
