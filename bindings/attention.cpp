// Attention from Python: tensors become flashspark_attention_params. The arguments are those of signature.def.
#include "attention.hpp"

#include <cmath>

#include "exports.hpp"

namespace flashspark::ffi {
namespace {

using A = attention::Argument;

// q, out, lse and the fields that follow from q's layout.
void read_queries(const Tensor &q, const Tensor &out, const Tensor &lse, const Tensor &cu_seqlens_q,
                  flashspark_attention_params &p) {
  const bool varlen = static_cast<bool>(cu_seqlens_q);
  q.require_ndim({varlen ? 3 : 4}, varlen ? "(total_q, num_heads, head_dim) with cu_seqlens_q"
                                          : "(num_seqs, seqlen_q, num_heads, head_dim)");
  p.q = q.rows();
  p.num_heads_q = q.size(-2);
  p.head_dim = q.size(-1);
  if (varlen) {
    cu_seqlens_q.require_ndim({1}, "(num_seqs + 1,)");
    if (cu_seqlens_q.size(0) < 1)
      fail_value("cu_seqlens_q.shape", cu_seqlens_q.shape_text(), "must be (num_seqs + 1,)");
    p.num_seqs = cu_seqlens_q.size(0) - 1;
    p.cu_seqlens_q = cu_seqlens_q.int32_vector(p.num_seqs + 1, "num_seqs + 1");
    p.total_q = q.size(0);
  } else {
    p.num_seqs = q.size(0);
    p.max_seqlen_q = q.size(1);
  }
  out.require_ndim({q.ndim()}, "of as many dimensions as q");
  for (int32_t i = 0; i + 1 < q.ndim(); ++i) out.require_size(i, q.size(i), "q's");
  out.require_size(-1, p.head_dim_v, "v's head size");
  p.out = out.rows();
  if (!lse) return;
  lse.require_float32();
  lse.require_ndim({varlen ? 2 : 3}, varlen ? "(num_heads, total_q)" : "(num_seqs, num_heads, seqlen_q)");
  lse.require_size(-2, p.num_heads_q, "q's heads");
  lse.require_size(-1, varlen ? p.total_q : p.max_seqlen_q, "q's rows");
  if (!varlen) lse.require_size(0, p.num_seqs, "the number of sequences");
  p.lse = static_cast<float *>(lse.data());
  p.lse_batch_stride = varlen ? 0 : lse.stride(0);
  p.lse_head_stride = lse.stride(-2);
  p.lse_token_stride = lse.stride(-1);
}

void read_heads(const Tensor &k, const Tensor &v, flashspark_attention_params &p) {
  k.require_ndim({3, 4}, "of 3 or 4 dimensions");
  v.require_ndim({k.ndim()}, "of as many dimensions as k");
  for (int32_t i = 0; i + 1 < k.ndim(); ++i) v.require_size(i, k.size(i), "k's");
  p.k = k.rows();
  p.v = v.rows();
  p.num_heads_kv = k.size(-2);
  p.head_dim_v = v.size(-1);
}

void read_pages(const Tensor &k, const Tensor &table, bool indexed, flashspark_attention_params &p) {
  table.require_ndim({2}, "(num_seqs, pages per sequence)");
  if (!indexed) table.require_size(0, p.num_seqs, "the number of sequences");
  table.require_unit_stride();
  p.page_table = table.int32_data();
  k.require_ndim({4}, "(num_pages, page_size, num_heads_kv, head_dim) with a page table");
  // The stride of a dimension with one element is arbitrary.
  p.page_table_stride = table.size(0) > 1 ? table.stride(0) : table.size(1);
  p.num_page_slots = table.size(1);
  p.num_pages = k.size(0);
  p.page_size = k.size(1);
  table.require_rows();
  p.num_kv_seqs = table.size(0);
}

// k's layout and the lengths of keys.
void read_keys(const Tensor &k, Reader &args, flashspark_attention_params &p) {
  k.require_size(-1, p.head_dim, "q's head size");
  const Tensor cu_seqlens_k = args.optional_tensor(A::cu_seqlens_k), table = args.optional_tensor(A::page_table);
  const Tensor index = args.optional_tensor(A::kv_batch_index), used = args.optional_tensor(A::seqused_k);
  const int64_t bound = args.bound(A::max_seqlen_k);
  if (table) {
    read_pages(k, table, static_cast<bool>(index), p);
    // Without lengths every sequence uses its whole row of the table, and the bound is exact.
    p.max_seqlen_k = used && bound >= 0 ? bound : p.num_page_slots * p.page_size;
  } else if (cu_seqlens_k) {
    k.require_ndim({3}, "(total_k, num_heads_kv, head_dim) with cu_seqlens_k");
    p.total_k = k.size(0);
    p.max_seqlen_k = bound >= 0 ? bound : p.total_k;
  } else {
    k.require_ndim({4}, "(num_seqs, seqlen_k, num_heads_kv, head_dim) without cu_seqlens_k");
    if (!index) k.require_size(0, p.num_seqs, "the number of sequences");
    p.num_kv_seqs = k.size(0);
    p.max_seqlen_k = k.size(1);
  }
  // num_kv_seqs == 0 would mean "as many as num_seqs".
  if (index && !cu_seqlens_k && p.num_kv_seqs == 0 && p.num_seqs > 0) {
    fail_value(std::string((table ? table : k).name()) + ".shape[0]", "0",
               std::string("must hold the rows of ") + index.name());
  }
  const char *one_per_sequence = "the number of sequences";
  p.cu_seqlens_k = cu_seqlens_k.int32_vector(p.num_seqs + 1, "num_seqs + 1");
  p.kv_batch_index = index.int32_vector(p.num_seqs, one_per_sequence);
  p.seqused_q = args.optional_tensor(A::seqused_q).int32_vector(p.num_seqs, one_per_sequence);
  p.seqused_k = used.int32_vector(p.num_seqs, one_per_sequence);
  p.leftpad_k = args.optional_tensor(A::leftpad_k).int32_vector(p.num_seqs, one_per_sequence);
}

void read_bias(const Tensor &sinks, const Tensor &alibi_slopes, const Tensor &rel_logits,
               flashspark_attention_params &p) {
  if (sinks) {
    sinks.require_ndim({1}, "(num_heads,)");
    sinks.require_size(0, p.num_heads_q, "q's heads");
    sinks.require_float();
    sinks.require_dense();
    p.sinks = sinks.data();
    p.sinks_dtype = sinks.dtype();
  }
  if (alibi_slopes) {
    alibi_slopes.require_ndim({1, 2}, "(num_heads,) or (num_seqs, num_heads)");
    alibi_slopes.require_size(-1, p.num_heads_q, "q's heads");
    alibi_slopes.require_float32();
    alibi_slopes.require_unit_stride();
    p.alibi_slopes = static_cast<const float *>(alibi_slopes.data());
    if (alibi_slopes.ndim() == 2) {
      alibi_slopes.require_size(0, p.num_seqs, "the number of sequences");
      p.alibi_batch_stride = p.num_seqs > 1 ? alibi_slopes.stride(0) : 0;
    }
  }
  if (!rel_logits) return;
  const bool varlen = p.cu_seqlens_q != nullptr;
  rel_logits.require_ndim({varlen ? 3 : 4},
                          varlen ? "(total_q, num_heads, extent)" : "(num_seqs, seqlen_q, num_heads, extent)");
  rel_logits.require_size(-3, varlen ? p.total_q : p.max_seqlen_q, "q's rows");
  rel_logits.require_size(-2, p.num_heads_q, "q's heads");
  rel_logits.require_float();
  rel_logits.require_unit_stride();
  if (!varlen) {
    rel_logits.require_size(0, p.num_seqs, "the number of sequences");
    if (p.num_seqs > 1 && rel_logits.stride(0) != p.max_seqlen_q * rel_logits.stride(1)) {
      fail_value("rel_logits.stride(0)", std::to_string(rel_logits.stride(0)), "must be seqlen_q * stride(1)");
    }
  }
  p.rel_logits = rel_logits.data();
  p.rel_dtype = rel_logits.dtype();
  p.rel_extent = rel_logits.size(-1);
  p.rel_token_stride = rel_logits.stride(-3);
  p.rel_head_stride = rel_logits.stride(-2);
}

void read_prefix(const Tensor &ranges, flashspark_attention_params &p) {
  if (!ranges) return;
  ranges.require_ndim({2, 3}, "(num_seqs, ranges, 2) or (total_q, 2)");
  ranges.require_size(-1, 2, "a first and a last key");
  ranges.require_dense();
  p.prefix_ranges = ranges.int32_data();
  if (ranges.ndim() == 3) {
    ranges.require_size(0, p.num_seqs, "the number of sequences");
    p.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
    p.num_prefix_ranges = ranges.size(1);
  } else {
    ranges.require_size(0, p.cu_seqlens_q ? p.total_q : p.num_seqs * p.max_seqlen_q, "q's rows");
    p.prefix_mode = FLASHSPARK_PREFIX_PER_TOKEN;
  }
}

void read_scales(Reader &args, flashspark_attention_params &p) {
  p.q_descale = args.optional_tensor(A::q_descale).per_head_scale(p.num_seqs, p.num_heads_kv);
  p.k_descale = args.optional_tensor(A::k_descale).per_head_scale(p.num_seqs, p.num_heads_kv);
  p.v_descale = args.optional_tensor(A::v_descale).per_head_scale(p.num_seqs, p.num_heads_kv);
  const Tensor output_scale = args.optional_tensor(A::output_scale);
  if (!output_scale) return;
  output_scale.require_float32();
  output_scale.require_ndim({0, 1}, "of one element");
  if (output_scale.ndim() == 1) output_scale.require_size(0, 1, "one element");
  p.output_scale = static_cast<const float *>(output_scale.data());
}

void read_mask(Reader &args, flashspark_attention_params &p) {
  const char *one_per_sequence = "the number of sequences";
  p.causal = args.flag(A::causal, 0);
  p.window_left = args.integer(A::window_left, -1);
  p.window_right = args.integer(A::window_right, -1);
  p.attention_chunk = args.integer(A::attention_chunk, 0);
  p.causal_per_seq = args.optional_tensor(A::causal_per_seq).int32_vector(p.num_seqs, one_per_sequence);
  read_prefix(args.optional_tensor(A::prefix_ranges), p);
  p.prefix_clamp_window = args.flag(A::prefix_clamp_window, 0);
  p.rswa_prefix_lens = args.optional_tensor(A::rswa_prefix_lens).int32_vector(p.num_seqs, one_per_sequence);
  p.rswa_window = args.integer32(A::rswa_window, 0);
}

void read_dropout(Reader &args, flashspark_attention_params &p) {
  p.dropout_p = static_cast<float>(args.real(A::dropout_p, 0));
  if (const Tensor state = args.optional_tensor(A::rng_state)) p.dropout_state = state.random_state();
}

void read_options(const Reader &args, Call &call) {
  flashspark_attention_params &p = call.params;
  p.softmax_scale = args.is_none(A::softmax_scale) ? 1 / std::sqrt(static_cast<float>(p.head_dim))
                                                   : static_cast<float>(args.real(A::softmax_scale, 0));
  p.softcap = static_cast<float>(args.real(A::softcap, 0));
  p.num_splits = args.integer32(A::num_splits, 0);
  p.deterministic = args.flag(A::deterministic, 0);
  call.implementation = args.text(A::implementation);
  if (!call.implementation.empty()) p.implementation = call.implementation.c_str();
  p.num_threads = args.integer32(A::num_threads, 0);
  p.check_device = args.flag(A::check_device, 0);
}

}  // namespace

void read_call(Reader &args, Call &call) {
  flashspark_attention_params &p = call.params;
  flashspark_attention_params_init(&p);
  const int64_t code = args.integer(A::face, 0), face = code & ~kHeadsFirst;
  if (face < 0 || face >= kNumFaces) fail_value("face", std::to_string(face), "must be 0, 1 or 2");
  call.face = static_cast<Face>(face);
  call.heads_first = (code & kHeadsFirst) != 0;
  args.set_names(attention::kNames[face], attention::kCount, "captured tensor");
  const int64_t stored_as = call.stored_as = args.integer(A::stored_as, 0);
  const auto rows = [&](int32_t index, int stored) {
    return call.in_order(args.tensor(index, stored_type(stored_as, stored)));
  };
  const Tensor q = rows(A::q, kStoredQ), k = rows(A::k, kStoredK), v = rows(A::v, kStoredV);
  const Tensor out = rows(A::out, kStoredOut);
  const Tensor cu_seqlens_q = args.optional_tensor(A::cu_seqlens_q);
  read_heads(k, v, p);
  read_queries(q, out, args.optional_tensor(A::lse), cu_seqlens_q, p);
  const int64_t max_seqlen_q = args.bound(A::max_seqlen_q);
  if (cu_seqlens_q) p.max_seqlen_q = max_seqlen_q >= 0 ? max_seqlen_q : p.total_q;
  read_keys(k, args, p);
  read_options(args, call);
  read_bias(args.optional_tensor(A::sinks, stored_type(stored_as, kStoredSinks)), args.optional_tensor(A::alibi_slopes),
            args.optional_tensor(A::rel_logits, stored_type(stored_as, kStoredRel)), p);
  read_scales(args, p);
  read_mask(args, p);
  read_dropout(args, p);
  call.functions.read(args, p);
  read_scheduler_metadata(args.optional_tensor(A::scheduler_metadata), p);
  args.set_device(p);
}

void require_ok(flashspark_status status, Face face) {
  if (status == FLASHSPARK_OK) return;
  throw CallError{error_kind(status), in_callers_words(flashspark_last_error(), kAttentionNames, face)};
}

void *Scratch::allocate(void *scratch, size_t bytes) {
  auto &self = *static_cast<Scratch *>(scratch);
  int64_t shape[] = {static_cast<int64_t>(bytes)};
  DLTensor prototype{};
  prototype.device = {kDLCUDA, self.device_index_};
  prototype.ndim = 1;
  prototype.dtype = {kDLUInt, 8, 1};
  prototype.shape = shape;
  self.failed_ = TVMFFIEnvTensorAlloc(&prototype, &self.tensor_) != 0;
  return self.failed_ ? nullptr : TVMFFITensorGetDLTensorPtr(self.tensor_)->data;
}

flashspark_allocator Scratch::allocator() {
  return TVMFFIEnvGetDLPackManagedTensorAllocator() != nullptr ? allocate : nullptr;
}

const char *error_kind(flashspark_status status) {
  switch (status) {
    case FLASHSPARK_INVALID_ARGUMENT:
      return "ValueError";
    case FLASHSPARK_INVALID_TYPE:
      return "TypeError";
    case FLASHSPARK_UNSUPPORTED:
      return "NotImplementedError";
    case FLASHSPARK_OUT_OF_MEMORY:
      return "MemoryError";
    default:
      return "RuntimeError";
  }
}

void attention_forward(Reader &args) {
  Call call;
  read_call(args, call);
  Scratch scratch(call.params.device_index);
  const flashspark_status status =
      flashspark_attention_forward_with_allocator(&call.params, scratch.allocator(), &scratch);
  if (scratch.failed()) throw AlreadyRaised{};
  require_ok(status, call.face);
}

void attention_validate(Reader &args) {
  Call call;
  read_call(args, call);
  // Unlike flashspark_attention_validate(), this also fails if no implementation fits.
  require_ok(flashspark_attention_explain(&call.params, nullptr, 0), call.face);
}

std::string attention_explain(Reader &args) {
  Call call;
  read_call(args, call);
  return explained(call.face, flashspark_attention_explain, call.params);
}

}  // namespace flashspark::ffi
