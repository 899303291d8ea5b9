#include "validate.hpp"

#include <cmath>

#include "check.hpp"
#include "dtype.hpp"
#include "error.hpp"
#include "mod.hpp"

namespace flashspark {
namespace {

constexpr int64_t kMaxTokens = INT32_MAX;  // lengths travel as int32

void check_sizes(const Params &p) {
  check::in_range("num_seqs", p.num_seqs, 0, INT32_MAX - 1);
  check::heads(p.num_heads_q, p.num_heads_kv);
  check::width("head_dim", p.head_dim);
  check::width("head_dim_v", p.head_dim_v);
  check::in_range("max_seqlen_q", p.max_seqlen_q, 0, kMaxTokens);
  check::in_range("max_seqlen_k", p.max_seqlen_k, 0, kMaxTokens);
  check::in_range("total_q", p.total_q, 0, kMaxTokens);
  check::in_range("total_k", p.total_k, 0, kMaxTokens);
  check::in_range("num_kv_seqs", p.num_kv_seqs, 0, INT32_MAX);
  check::in_range("num_threads", p.num_threads, 0, 1024);
  check::in_range("num_splits", p.num_splits, 0, 1024);
  check::in_range("deterministic", p.deterministic, 0, 1);
  check::in_range("check_device", p.check_device, 0, 1);
  if (p.num_seqs > 0 && !is_varlen_q(p) && p.max_seqlen_q > kMaxTokens / p.num_seqs) {
    fail("max_seqlen_q", p.max_seqlen_q, "num_seqs * max_seqlen_q must be at most 2^31 - 1");
  }
}

void check_layout(const Params &p) {
  if (is_paged(p)) {
    check::absent("cu_seqlens_k", p.cu_seqlens_k, "must be NULL when page_table is given");
    check::paging(p.num_pages, p.page_size, p.num_page_slots, p.page_table_stride, num_kv_seqs(p));
    if (p.seqused_k == nullptr && p.num_seqs > 0 && p.max_seqlen_k > p.num_page_slots * p.page_size) {
      fail("max_seqlen_k", p.max_seqlen_k,
           "is every sequence's length without seqused_k and must be at most num_page_slots * page_size = " +
               std::to_string(p.num_page_slots * p.page_size));
    }
  } else if (p.page_size != 0 || p.num_pages != 0) {
    fail("page_size", p.page_size, "page_size and num_pages must be 0 without page_table");
  }
  if (is_varlen_k(p)) {
    check::absent("kv_batch_index", p.kv_batch_index, "must be NULL when cu_seqlens_k is given");
    check::absent("leftpad_k", p.leftpad_k, "must be NULL when cu_seqlens_k is given");
  }
  check::aligned_arrays({{"cu_seqlens_q", p.cu_seqlens_q},
                         {"cu_seqlens_k", p.cu_seqlens_k},
                         {"seqused_q", p.seqused_q},
                         {"seqused_k", p.seqused_k},
                         {"leftpad_k", p.leftpad_k},
                         {"kv_batch_index", p.kv_batch_index},
                         {"page_table", p.page_table},
                         {"causal_per_seq", p.causal_per_seq},
                         {"prefix_ranges", p.prefix_ranges},
                         {"rswa_prefix_lens", p.rswa_prefix_lens},
                         {"scheduler_metadata", p.scheduler_metadata}});
  check::in_range("scheduler_metadata_size", p.scheduler_metadata_size, 0, INT64_MAX);
}

void check_types(const Params &p) {
  check::dtype("q.dtype", p.q.dtype, true);
  check::dtype("k.dtype", p.k.dtype, true);
  check::dtype("v.dtype", p.v.dtype, true);
  check::dtype("out.dtype", p.out.dtype, true);
  check::same_dtype("v.dtype", p.v.dtype, "k", p.k.dtype);
  if (p.k.dtype != p.q.dtype && p.k.dtype != FLASHSPARK_FLOAT8_E4M3) {
    fail("k.dtype", dtype_name(p.k.dtype), std::string("must be q's (") + dtype_name(p.q.dtype) + ") or float8_e4m3",
         FLASHSPARK_INVALID_TYPE);
  }
}

void check_tensors(const Params &p) {
  const Extents e = extents_of(p);
  check::tensor("q", p.q, e.q_batch, e.q_tokens, p.num_heads_q);
  check::tensor("out", p.out, e.q_batch, e.q_tokens, p.num_heads_q);
  check::distinct("out", p.out, e.q_batch, e.q_tokens, p.num_heads_q, p.head_dim_v);
  if (p.lse != nullptr) {
    check::tensor("lse", as_lse_tensor(p, p.lse), e.q_batch, e.q_tokens, p.num_heads_q);
    check::distinct("lse", as_lse_tensor(p, p.lse), e.q_batch, e.q_tokens, p.num_heads_q, 1);
  }
  check::tensor("k", p.k, e.kv_batch, e.kv_tokens, p.num_heads_kv);
  check::tensor("v", p.v, e.kv_batch, e.kv_tokens, p.num_heads_kv);
}

// Nothing that is read may be written, except that out may be q: whoever writes a row has read it, and nobody else
// reads it. On a GPU several CTAs compute a value wider than kMostInPlaceOnGpu, and all of them read the row.
constexpr int64_t kMostInPlaceOnGpu = 256;

void check_overlap(const Params &p) {
  const Extents e = extents_of(p);
  const flashspark_tensor lse_t = as_lse_tensor(p, p.lse), rel_t = as_rel_tensor(p, p.rel_logits, p.rel_dtype);
  const check::View q{"q", p.q, e.q_batch, e.q_tokens, p.num_heads_q, p.head_dim},
      k{"k", p.k, e.kv_batch, e.kv_tokens, p.num_heads_kv, p.head_dim},
      v{"v", p.v, e.kv_batch, e.kv_tokens, p.num_heads_kv, p.head_dim_v},
      out{"out", p.out, e.q_batch, e.q_tokens, p.num_heads_q, p.head_dim_v},
      lse{"lse", lse_t, e.q_batch, e.q_tokens, p.num_heads_q, 1},
      rel{"rel_logits", rel_t, 1, rel_tokens(p), p.num_heads_q, p.rel_extent};
  constexpr const char *kNever = "results must have memory of their own";
  const bool in_place = check::same(out, q) && (p.device == FLASHSPARK_CPU || p.head_dim_v <= kMostInPlaceOnGpu);
  if (!in_place) {
    check::apart(out, q,
                 "results must have memory of their own, or be q itself: the same address, strides, type and width (on "
                 "a GPU at most 256)");
  }
  check::apart(out, k, kNever);
  check::apart(out, v, kNever);
  check::apart(out, rel, kNever);
  for (const check::View *other : {&q, &k, &v, &out, &rel}) check::apart(lse, *other, kNever);
}

void check_scores(const Params &p) {
  if (!(p.softmax_scale >= 0) || std::isinf(p.softmax_scale)) {
    fail("softmax_scale", double{p.softmax_scale}, "must be finite and >= 0");
  }
  if (!(p.softcap >= 0) || std::isinf(p.softcap))
    fail("softcap", double{p.softcap}, "must be finite and >= 0 (0: off)");
  check::scale("q_descale", p.q_descale);
  check::scale("k_descale", p.k_descale);
  check::scale("v_descale", p.v_descale);
  if (p.out.dtype != FLASHSPARK_FLOAT8_E4M3)
    check::absent("output_scale", p.output_scale, "must be NULL unless out is float8_e4m3");
  if (p.sinks != nullptr) {
    check::dtype("sinks_dtype", p.sinks_dtype, false);
    if (reinterpret_cast<uintptr_t>(p.sinks) % dtype_size(p.sinks_dtype) != 0) {
      fail("sinks", "misaligned", "must be aligned to its elements");
    }
  }
  if (p.rel_logits != nullptr) {
    check::dtype("rel_dtype", p.rel_dtype, false);
    check::in_range("rel_extent", p.rel_extent, 1, kMaxTokens);
    check::tensor("rel_logits", as_rel_tensor(p, p.rel_logits, p.rel_dtype), 1, rel_tokens(p), p.num_heads_q);
  }
  if (p.alibi_slopes != nullptr) {
    if (reinterpret_cast<uintptr_t>(p.alibi_slopes) % 4 != 0)
      fail("alibi_slopes", "misaligned", "must be aligned to 4 bytes");
    check::in_range("alibi_batch_stride", p.alibi_batch_stride, 0, int64_t{1} << 30);
  }
}

// Without dropout nobody looks at seed, offset and state.
void check_dropout(const Params &p) {
  if (!(p.dropout_p >= 0 && p.dropout_p < 1)) {
    fail("dropout_p", double{p.dropout_p}, "must be from 0 (none) to below 1");
  }
  if (p.reserved_dropout != 0) fail("reserved_dropout", int64_t{p.reserved_dropout}, "must be 0");
  if (p.dropout_p > 0) check::aligned_arrays({{"dropout_state", p.dropout_state}});
}

void check_mask(const Params &p) {
  check::in_range("causal", p.causal, 0, 1);
  check::in_range("window_left", p.window_left, -1, kMaxTokens);
  check::in_range("window_right", p.window_right, -1, kMaxTokens);
  check::in_range("attention_chunk", p.attention_chunk, 0, kMaxTokens);
  check::in_range("prefix_mode", p.prefix_mode, 0, 2);
  check::in_range("prefix_clamp_window", p.prefix_clamp_window, 0, 1);
  check::in_range("rswa_window", p.rswa_window, 0, kMaxTokens);
  if (p.prefix_mode != FLASHSPARK_PREFIX_NONE) {
    check::in_range("num_prefix_ranges", p.num_prefix_ranges, 0, 1 << 24);
    const int64_t tokens = is_varlen_q(p) ? p.total_q : p.max_seqlen_q;
    const int64_t ranges = p.prefix_mode == FLASHSPARK_PREFIX_PER_TOKEN ? tokens : p.num_prefix_ranges;
    if (p.num_seqs > 0 && ranges > 0)
      check::present("prefix_ranges", p.prefix_ranges, "must be given with prefix_mode");
    if (p.rswa_window > 0) fail("rswa_window", int64_t{p.rswa_window}, "must be 0 with prefix_mode");
  }
  if (p.rswa_window > 0) {
    if (p.num_seqs > 0) check::present("rswa_prefix_lens", p.rswa_prefix_lens, "must be given with rswa_window");
    if (p.window_left >= 0) fail("window_left", p.window_left, "must be -1 with rswa_window");
    if (p.window_right >= 0) fail("window_right", p.window_right, "must be -1 with rswa_window");
    if (p.attention_chunk > 0) fail("attention_chunk", p.attention_chunk, "must be 0 with rswa_window");
  }
}

// The rules that look at no tensor.
void check_problem(const Params &p) {
  check::version(p.struct_size, sizeof(Params), p.abi_version, "flashspark_attention_params");
  check::device(p.device, p.device_index);
  check_sizes(p);
  check_layout(p);
  check_types(p);
}
}  // namespace

void validate(const Params &p) {
  check_problem(p);
  check_tensors(p);
  check_scores(p);
  check_dropout(p);
  check_mask(p);
  check_overlap(p);
  if (has_functions(p) || has_block_lists(p)) validate_functions(p);
  if (p.device == FLASHSPARK_CPU) check_metadata(p);
}

void validate_schedule(const Params &p) {
  check_problem(p);
  check_mask(p);
}

}  // namespace flashspark
