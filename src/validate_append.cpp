#include "validate.hpp"

#include "check.hpp"
#include "dtype.hpp"
#include "error.hpp"

namespace flashspark {
namespace {

void check_dtypes(const AppendParams &p) {
  check::dtype("k_new.dtype", p.k_new.dtype, true);
  check::dtype("k_cache.dtype", p.k_cache.dtype, true);
  check::same_dtype("v_new.dtype", p.v_new.dtype, "k_new", p.k_new.dtype);
  check::same_dtype("v_cache.dtype", p.v_cache.dtype, "k_cache", p.k_cache.dtype);
  if (p.k_cache.dtype != FLASHSPARK_FLOAT8_E4M3)
    check::same_dtype("k_new.dtype", p.k_new.dtype, "k_cache", p.k_cache.dtype);
}

void check_rotary(const AppendParams &p) {
  if ((p.rotary_cos == nullptr) != (p.rotary_sin == nullptr)) {
    fail(p.rotary_cos == nullptr ? "rotary_cos" : "rotary_sin", "NULL", "cos and sin go together");
  }
  if (p.rotary_cos == nullptr)
    check::absent("q", p.q.data, "must be NULL without rotary_cos: nothing would be done to it");
  const bool turns_slots = p.slot_mapping != nullptr && p.rotary_cos != nullptr;
  if (turns_slots) {
    check::present("rotary_positions", p.rotary_positions,
                   "must be given with slot_mapping and rotary_cos: slots tell no positions");
  } else {
    check::absent("rotary_positions", p.rotary_positions, "must be NULL without slot_mapping and rotary_cos");
  }
  if (p.rotary_cos == nullptr) return;
  check::dtype("rotary_dtype", p.rotary_dtype, false);
  check::in_range("rotary_interleaved", p.rotary_interleaved, 0, 1);
  check::in_range("q_rotary_per_token", p.q_rotary_per_token, 0, 1);
  check::in_range("seqlen_rotary", p.seqlen_rotary, 0, INT32_MAX);
  if (p.rotary_dim < 2 || p.rotary_dim > p.head_dim || p.rotary_dim % 2 != 0) {
    fail("rotary_dim", p.rotary_dim, "must be even and from 2 to head_dim = " + std::to_string(p.head_dim));
  }
  if (p.rotary_stride != 0 && p.rotary_stride < p.rotary_dim / 2) {
    fail("rotary_stride", p.rotary_stride,
         "must be 0 or at least rotary_dim / 2 = " + std::to_string(p.rotary_dim / 2));
  }
  if (p.k_new.dtype == FLASHSPARK_FLOAT8_E4M3) {
    fail("k_new.dtype", "float8_e4m3", "rotary embedding takes 16- or 32-bit rows", FLASHSPARK_INVALID_TYPE);
  }
}

void check_slots(const AppendParams &p) {
  constexpr const char *kRule = "must be NULL when slot_mapping is given";
  check::absent("seqlens", p.seqlens, kRule);
  check::absent("cu_seqlens_new", p.cu_seqlens_new, kRule);
  check::absent("cu_seqlens_q", p.cu_seqlens_q, kRule);
  check::absent("seqused_q", p.seqused_q, kRule);
  check::absent("kv_batch_index", p.kv_batch_index, kRule);
  check::absent("rotary_seqlens", p.rotary_seqlens, kRule);
  check::absent("page_table", p.page_table, kRule);
  if (p.num_seqs != 1) fail("num_seqs", p.num_seqs, "must be 1 when slot_mapping is given");
  check::in_range("num_pages", p.num_pages, 0, INT32_MAX);
  check::in_range("page_size", p.page_size, 1, INT32_MAX);
  if (p.num_pages * p.page_size > INT32_MAX) {
    fail("num_pages", p.num_pages,
         "must be at most " + std::to_string(INT32_MAX / p.page_size) + " pages of " + std::to_string(p.page_size) +
             " when slot_mapping is given");
  }
}

// q has as many rows as k_new only with slot_mapping.
void check_queries(const AppendParams &p) {
  if (p.q.data == nullptr) {
    check::absent("cu_seqlens_q", p.cu_seqlens_q, "must be NULL without q");
    check::absent("seqused_q", p.seqused_q, "must be NULL without q");
  }
  if (p.rotary_cos == nullptr) check::absent("rotary_seqlens", p.rotary_seqlens, "must be NULL without rotary_cos");
  if (p.q.data == nullptr) return;
  check::in_range("seqlen_q", p.seqlen_q, 0, INT32_MAX);
  check::in_range("total_q", p.total_q, 0, INT32_MAX);
  if (p.slot_mapping != nullptr && p.total_q != p.total_new) {
    fail("total_q", p.total_q, "must be total_new = " + std::to_string(p.total_new) + " when slot_mapping is given");
  }
  check::heads(p.num_heads_q, p.num_heads_kv);
  check::dtype("q.dtype", p.q.dtype, false);
}

// The caches are written, the new rows are read, q is both. k_cache and v_cache may interleave in any way.
void check_tensors(const AppendParams &p) {
  const bool slots = p.slot_mapping != nullptr, varlen = p.cu_seqlens_new != nullptr || slots;
  const bool varlen_q = p.cu_seqlens_q != nullptr || slots, paged = p.page_table != nullptr || slots;
  const int64_t batch = varlen ? 1 : p.num_seqs, tokens = varlen ? p.total_new : p.seqlen_new;
  const int64_t rows = paged ? p.num_pages : p.num_cache_rows, row_tokens = paged ? p.page_size : p.seqlen_cache;
  const check::View views[] = {
      {"k_cache", p.k_cache, rows, row_tokens, p.num_heads_kv, p.head_dim},
      {"v_cache", p.v_cache, rows, row_tokens, p.num_heads_kv, p.head_dim_v},
      {"q", p.q, varlen_q ? 1 : p.num_seqs, varlen_q ? p.total_q : p.seqlen_q, p.num_heads_q, p.head_dim},
      {"k_new", p.k_new, batch, tokens, p.num_heads_kv, p.head_dim},
      {"v_new", p.v_new, batch, tokens, p.num_heads_kv, p.head_dim_v}};
  const auto &[k_cache, v_cache, q, k_new, v_new] = views;
  for (const check::View *v : {&k_new, &v_new, &k_cache, &v_cache, &q}) {
    if (v == &q && p.q.data == nullptr) continue;
    check::tensor(v->name, v->tensor, v->batch, v->tokens, v->heads);
    if (v != &k_new && v != &v_new) check::distinct(v->name, v->tensor, v->batch, v->tokens, v->heads, v->width);
  }
  constexpr const char *kCache = "a cache must not hold the rows that are written to it";
  for (const check::View *other : {&k_new, &v_new, &q}) {
    check::apart(k_cache, *other, kCache);
    check::apart(v_cache, *other, kCache);
  }
  check::apart(q, k_new, "q is turned in place");
  check::apart(q, v_new, "q is turned in place");
}

}  // namespace

void validate(const AppendParams &p) {
  check::version(p.struct_size, sizeof(AppendParams), p.abi_version, "flashspark_append_params");
  check::device(p.device, p.device_index);
  check::in_range("check_device", p.check_device, 0, 1);
  check::in_range("num_seqs", p.num_seqs, 0, INT32_MAX - 1);
  check::in_range("num_heads_kv", p.num_heads_kv, 1, 1 << 16);
  check::in_range("head_dim", p.head_dim, 1, kMaxHeadDim);  // rows are copied, whatever their width
  check::in_range("head_dim_v", p.head_dim_v, 1, kMaxHeadDim);
  check::in_range("seqlen_new", p.seqlen_new, 0, INT32_MAX);
  check::in_range("total_new", p.total_new, 0, INT32_MAX);
  check::in_range("seqlen_cache", p.seqlen_cache, 0, INT32_MAX);
  check::in_range("num_cache_rows", p.num_cache_rows, 0, INT32_MAX);
  check_dtypes(p);
  check_rotary(p);
  const bool slots = p.slot_mapping != nullptr;
  if (slots) {
    check_slots(p);
  } else if (p.page_table != nullptr) {
    check::paging(p.num_pages, p.page_size, p.num_page_slots, p.page_table_stride,
                  p.kv_batch_index != nullptr ? p.num_cache_rows : p.num_seqs);
  } else if (p.kv_batch_index == nullptr && p.num_cache_rows < p.num_seqs) {
    fail("num_cache_rows", p.num_cache_rows, "must be at least num_seqs = " + std::to_string(p.num_seqs));
  }
  check::aligned_arrays({{"seqlens", p.seqlens},
                         {"cu_seqlens_new", p.cu_seqlens_new},
                         {"cu_seqlens_q", p.cu_seqlens_q},
                         {"seqused_q", p.seqused_q},
                         {"kv_batch_index", p.kv_batch_index},
                         {"rotary_seqlens", p.rotary_seqlens},
                         {"page_table", p.page_table}});
  check::aligned_arrays({{"slot_mapping", p.slot_mapping}, {"rotary_positions", p.rotary_positions}});

  check_queries(p);
  check_tensors(p);
  check::scale("k_descale", p.k_descale);
  check::scale("v_descale", p.v_descale);
  if (p.device == FLASHSPARK_CPU) check_metadata(p);
}

}  // namespace flashspark
