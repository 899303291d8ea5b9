// get_scheduler_metadata from Python. The order of the arguments is the contract with _schedule.py.
#include "exports.hpp"
#include "names.hpp"

namespace flashspark::ffi {
namespace {

void require_ok(flashspark_status status) {
  if (status == FLASHSPARK_OK) return;
  throw CallError{error_kind(status), in_callers_words(flashspark_last_error(), kScheduleNames, kFunc)};
}

}  // namespace

void read_schedule(const Tensor &metadata, flashspark_attention_params &p) {
  if (!metadata) return;
  metadata.require_ndim({1}, "of one dimension");
  metadata.require_unit_stride();
  p.scheduler_metadata = const_cast<int32_t *>(metadata.int32_data());
  p.scheduler_metadata_size = metadata.size(0);
}

int64_t attention_schedule(Reader &args) {
  flashspark_attention_params p;
  flashspark_attention_params_init(&p);
  const Tensor metadata = args.optional_tensor("out");
  p.num_seqs = args.integer("batch_size", 0);
  p.max_seqlen_q = args.integer("max_seqlen_q", 0);
  p.max_seqlen_k = args.integer("max_seqlen_k", 0);
  p.num_heads_q = args.integer("num_heads_q", 0);
  p.num_heads_kv = args.integer("num_heads_kv", 0);
  p.head_dim = args.integer("headdim", 0);
  p.head_dim_v = args.integer("headdim_v", p.head_dim);
  p.k.dtype = p.v.dtype = args.integer32("qkv_dtype", FLASHSPARK_BFLOAT16);
  p.q.dtype = p.out.dtype = p.k.dtype == FLASHSPARK_FLOAT8_E4M3 ? FLASHSPARK_BFLOAT16 : p.k.dtype;
  const char *one_per_sequence = "batch_size";
  p.seqused_k = args.optional_tensor("cache_seqlens").int32_vector(p.num_seqs, one_per_sequence);
  p.cu_seqlens_q = args.optional_tensor("cu_seqlens_q").int32_vector(p.num_seqs + 1, "batch_size + 1");
  p.seqused_q = args.optional_tensor("seqused_q").int32_vector(p.num_seqs, one_per_sequence);
  p.leftpad_k = args.optional_tensor("cache_leftpad").int32_vector(p.num_seqs, one_per_sequence);
  p.kv_batch_index = args.optional_tensor("cache_batch_idx").int32_vector(p.num_seqs, one_per_sequence);
  p.causal_per_seq = args.optional_tensor("causal_per_seq").int32_vector(p.num_seqs, one_per_sequence);
  p.causal = args.integer32("causal", 0);
  p.window_left = args.integer("window_size[0]", -1);
  p.window_right = args.integer("window_size[1]", -1);
  p.softcap = args.integer32("has_softcap", 0) != 0 ? 1.0f : 0.0f;
  p.num_splits = args.integer32("num_splits", 0);
  p.deterministic = args.integer32("deterministic", 0);
  if (p.cu_seqlens_q != nullptr) p.total_q = p.num_seqs * p.max_seqlen_q;  // a bound
  p.num_kv_seqs = p.num_seqs;
  args.place(p);
  read_schedule(metadata, p);
  int64_t size = 0;
  require_ok(flashspark_attention_schedule_size(&p, &size));
  if (metadata && size > 0) require_ok(flashspark_attention_schedule(&p));
  return size;
}

}  // namespace flashspark::ffi
