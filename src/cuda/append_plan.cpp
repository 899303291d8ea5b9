#include <algorithm>

#include "cuda/append.hpp"
#include "cuda/arguments.hpp"

namespace flashspark::cuda {
namespace {

void set_tensors(const AppendParams &p, AppendArguments &a) {
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
  a.new_dtype = dtype_of(p.k_new.dtype);
  a.cache_dtype = dtype_of(p.k_cache.dtype);
  a.q_dtype = dtype_of(p.q.dtype);
  if (p.k_cache.dtype == FLASHSPARK_FLOAT8_E4M3 && p.k_new.dtype != FLASHSPARK_FLOAT8_E4M3) {
    a.k_descale = scale_of(p.k_descale);
    a.v_descale = scale_of(p.v_descale);
  }
}

void set_lengths(const AppendParams &p, AppendArguments &a) {
  copy_lengths(p, a);
  a.num_heads_q = static_cast<int32_t>(p.num_heads_q);
  a.seqlens = p.seqlens;
  a.cu_seqlens_new = p.cu_seqlens_new;
  a.slot_mapping = p.slot_mapping;
  a.seqlen_new = make_divisor(static_cast<uint32_t>(std::max<int64_t>(1, p.seqlen_new)));
  a.seqlen_q = make_divisor(static_cast<uint32_t>(std::max<int64_t>(1, p.seqlen_q)));
  const bool slots = p.slot_mapping != nullptr, paged = p.page_table != nullptr || slots;
  if (paged) a.page_size = make_divisor(static_cast<uint32_t>(p.page_size));
  const int64_t pages = slots ? p.num_pages : p.num_page_slots;
  a.capacity = static_cast<int32_t>(std::min<int64_t>(paged ? pages * p.page_size : p.seqlen_cache, INT32_MAX));
  const bool named = p.kv_batch_index != nullptr || p.page_table == nullptr;
  a.cache_rows = static_cast<int32_t>(named ? p.num_cache_rows : p.num_seqs);
  a.cache_batches = static_cast<int32_t>(paged ? p.num_pages : p.num_cache_rows);
}

void set_rotary(const AppendParams &p, AppendArguments &a) {
  a.rotary_cos = p.rotary_cos;
  a.rotary_sin = p.rotary_sin;
  a.rotary_dtype = dtype_of(p.rotary_dtype);
  a.rotary_positions = p.rotary_positions;
  a.rotary_seqlens = p.rotary_seqlens;
  a.rotary_stride = rotary_stride(p);
  a.rotary_interleaved = p.rotary_interleaved;
  a.rotary_dim = static_cast<int32_t>(p.rotary_dim);
  a.seqlen_rotary = static_cast<int32_t>(p.seqlen_rotary);
  a.q_rotary_per_token = p.q_rotary_per_token;
}

}  // namespace

AppendPlan make_append_plan(const AppendParams &p) {
  AppendPlan plan;
  set_tensors(p, plan.arguments);
  set_lengths(p, plan.arguments);
  set_rotary(p, plan.arguments);
  const auto rows = [&](const int32_t *offsets, int64_t total, int64_t seqlen) {
    return offsets != nullptr || p.slot_mapping != nullptr ? total : p.num_seqs * seqlen;
  };
  const int64_t new_rows = rows(p.cu_seqlens_new, p.total_new, p.seqlen_new);
  const int64_t q_rows = p.q.data != nullptr ? rows(p.cu_seqlens_q, p.total_q, p.seqlen_q) : 0;
  plan.arguments.new_rows = static_cast<int32_t>(new_rows);
  plan.launch = {.grid = {static_cast<uint32_t>(new_rows + q_rows), 1, 1},
                 .threads = traits_of(Operation::append_kv).threads};
  return plan;
}

}  // namespace flashspark::cuda
