// get_scheduler_metadata from Python. The arguments are those of signature.def.
#include "exports.hpp"
#include "names.hpp"

namespace flashspark::ffi {
namespace {

void require_ok(flashspark_status status) {
  if (status == FLASHSPARK_OK) return;
  throw CallError{error_kind(status), in_callers_words(flashspark_last_error(), kScheduleNames, kFunc)};
}

}  // namespace

void read_scheduler_metadata(const Tensor &metadata, flashspark_attention_params &p) {
  if (!metadata) return;
  metadata.require_ndim({1}, "of one dimension");
  metadata.require_unit_stride();
  p.scheduler_metadata = const_cast<int32_t *>(metadata.int32_data());
  p.scheduler_metadata_size = metadata.size(0);
}

int64_t attention_schedule(Reader &args) {
  using A = schedule::Argument;
  flashspark_attention_params p;
  flashspark_attention_params_init(&p);
  args.set_names(schedule::kNames, std::size(schedule::kNames));
  const Tensor metadata = args.optional_tensor(A::out);
  p.num_seqs = args.integer(A::batch_size, 0);
  p.max_seqlen_q = args.integer(A::max_seqlen_q, 0);
  p.max_seqlen_k = args.integer(A::max_seqlen_k, 0);
  p.num_heads_q = args.integer(A::num_heads_q, 0);
  p.num_heads_kv = args.integer(A::num_heads_kv, 0);
  p.head_dim = args.integer(A::headdim, 0);
  p.head_dim_v = args.integer(A::headdim_v, p.head_dim);
  p.k.dtype = p.v.dtype = args.integer32(A::qkv_dtype, FLASHSPARK_BFLOAT16);
  p.q.dtype = p.out.dtype = p.k.dtype == FLASHSPARK_FLOAT8_E4M3 ? FLASHSPARK_BFLOAT16 : p.k.dtype;
  const auto each = [&](int32_t index, int64_t more = 0) {
    return args.optional_tensor(index).int32_vector(p.num_seqs + more, more == 0 ? "batch_size" : "batch_size + 1");
  };
  p.seqused_k = each(A::cache_seqlens);
  p.cu_seqlens_q = each(A::cu_seqlens_q, 1);
  p.seqused_q = each(A::seqused_q);
  p.leftpad_k = each(A::cache_leftpad);
  p.kv_batch_index = each(A::cache_batch_idx);
  p.causal_per_seq = each(A::causal_per_seq);
  p.causal = args.flag(A::causal, 0);
  p.window_left = args.integer(A::window_left, -1);
  p.window_right = args.integer(A::window_right, -1);
  p.attention_chunk = args.integer(A::attention_chunk, 0);
  p.softcap = args.flag(A::has_softcap, 0) != 0 ? 1.0f : 0.0f;
  p.num_splits = args.integer32(A::num_splits, 0);
  p.deterministic = args.flag(A::deterministic, 0);
  if (p.cu_seqlens_q != nullptr) p.total_q = p.num_seqs * p.max_seqlen_q;  // an upper bound
  p.num_kv_seqs = p.num_seqs;
  args.set_device(p);
  read_scheduler_metadata(metadata, p);
  int64_t size = 0;
  require_ok(flashspark_attention_schedule_size(&p, &size));
  if (metadata && size > 0) require_ok(flashspark_attention_schedule(&p));
  return size;
}

}  // namespace flashspark::ffi
