#include <algorithm>

#include "cuda/append.hpp"
#include "cuda/arguments.hpp"

namespace flashspark::cuda {
namespace {

constexpr uint32_t kThreads = 128;  // kAppendWarps in append.cuh

}  // namespace

AppendPlan make_append_plan(const AppendParams &p) {
  AppendPlan plan;
  AppendArguments &a = plan.arguments;
  a.k_new = p.k_new.data;
  a.v_new = p.v_new.data;
  a.k_cache = p.k_cache.data;
  a.v_cache = p.v_cache.data;
  a.q = p.q.data;
  a.k_new_strides = strides_of(p.k_new);
  a.v_new_strides = strides_of(p.v_new);
  a.k_cache_strides = strides_of(p.k_cache);
  a.v_cache_strides = strides_of(p.v_cache);
  a.q_strides = strides_of(p.q);
  a.new_number = number_of(p.k_new.dtype);
  a.cache_number = number_of(p.k_cache.dtype);
  a.q_number = number_of(p.q.dtype);
  a.rotary_number = number_of(p.rotary_dtype);
  a.num_seqs = static_cast<int32_t>(p.num_seqs);
  a.num_heads_q = static_cast<int32_t>(p.num_heads_q);
  a.num_heads_kv = static_cast<int32_t>(p.num_heads_kv);
  a.head_dim = static_cast<int32_t>(p.head_dim);
  a.head_dim_v = static_cast<int32_t>(p.head_dim_v);
  a.seqlen_new = make_divisor(static_cast<uint32_t>(std::max<int64_t>(1, p.seqlen_new)));
  const bool slots = p.slot_mapping != nullptr, paged = p.page_table != nullptr || slots;
  if (paged) a.page_size = make_divisor(static_cast<uint32_t>(p.page_size));
  const int64_t pages = slots ? p.num_pages : p.num_page_slots;
  a.capacity = static_cast<int32_t>(std::min<int64_t>(paged ? pages * p.page_size : p.seqlen_cache, INT32_MAX));
  a.cache_batches = static_cast<int32_t>(paged ? p.num_pages : p.num_cache_rows);
  a.seqlens = p.seqlens;
  a.cu_seqlens_new = p.cu_seqlens_new;
  a.kv_batch_index = p.kv_batch_index;
  a.page_table = p.page_table;
  a.page_table_stride = p.page_table_stride;
  a.slot_mapping = p.slot_mapping;
  if (p.k_cache.dtype == FLASHSPARK_FLOAT8_E4M3 && p.k_new.dtype != FLASHSPARK_FLOAT8_E4M3) {
    a.k_descale = scale_of(p.k_descale);
    a.v_descale = scale_of(p.v_descale);
  }
  a.rotary_cos = p.rotary_cos;
  a.rotary_sin = p.rotary_sin;
  a.rotary_positions = p.rotary_positions;
  a.rotary_stride = rotary_stride(p);
  a.rotary_interleaved = p.rotary_interleaved;
  a.rotary_dim = static_cast<int32_t>(p.rotary_dim);
  a.seqlen_rotary = static_cast<int32_t>(p.seqlen_rotary);
  a.q_rotary_per_token = p.q_rotary_per_token;

  const bool packed = p.cu_seqlens_new != nullptr || slots;
  plan.launch.grid[0] = static_cast<uint32_t>(packed ? p.total_new : p.num_seqs * p.seqlen_new);
  plan.launch.grid[1] = plan.launch.grid[2] = 1;
  plan.launch.threads = kThreads;
  return plan;
}

}  // namespace flashspark::cuda
