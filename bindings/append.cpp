// append_kv from Python: tensors become flashspark_append_params, and q is rotated in place. The arguments are those of
// signature.def.
#include "exports.hpp"
#include "names.hpp"

namespace flashspark::ffi {
namespace {

using A = append::Argument;

enum { kStoredK, kStoredV, kStoredKCache, kStoredVCache, kStoredQ, kStoredCos, kStoredSin };  // indices in `stored_as`

struct Tensors {
  Tensor k, v, k_cache, v_cache, q, cu_seqlens_new, cu_seqlens_q, page_table, kv_batch_index, slot_mapping;
  Tensor rotary_positions, seqused_q;
};

// The elements' address. Torch gives empty tensors a null pointer, which the C interface would take for an absent
// tensor; they get another one.
const int64_t *int64_elements(const Tensor &vector) {
  static constexpr int64_t kNoElements = 0;
  const int64_t *elements = vector.int64_vector();
  return elements != nullptr ? elements : &kNoElements;
}

// slot_mapping has one entry for each new row; k and v may have more rows, as vLLM's padded tensors do.
void read_slots(const Tensors &t, flashspark_append_params &p) {
  p.slot_mapping = int64_elements(t.slot_mapping);
  p.num_seqs = 1;
  p.total_new = t.slot_mapping.size(0);
  if (t.k.size(0) < p.total_new) {
    fail_value("k.shape[0]", std::to_string(t.k.size(0)),
               "must be at least slot_mapping's length, " + std::to_string(p.total_new));
  }
}

void read_new_rows(const Tensors &t, flashspark_append_params &p) {
  const bool varlen = static_cast<bool>(t.cu_seqlens_new), slots = static_cast<bool>(t.slot_mapping);
  t.k.require_ndim({varlen || slots ? 3 : 4}, slots    ? "(total, num_heads_kv, head_dim) with slot_mapping"
                                              : varlen ? "(total, num_heads_kv, head_dim) with cu_seqlens_k_new"
                                                       : "(num_seqs, seqlen_new, num_heads_kv, head_dim)");
  t.v.require_ndim({t.k.ndim()}, "of as many dimensions as k");
  for (int32_t i = 0; i + 1 < t.k.ndim(); ++i) t.v.require_size(i, t.k.size(i), "k's");
  if (slots) {
    read_slots(t, p);
  } else if (varlen) {
    t.cu_seqlens_new.require_ndim({1}, "(num_seqs + 1,)");
    if (t.cu_seqlens_new.size(0) < 1) {
      fail_value("cu_seqlens_k_new.shape", t.cu_seqlens_new.shape_text(), "must be (num_seqs + 1,)");
    }
    p.num_seqs = t.cu_seqlens_new.size(0) - 1;
    p.total_new = p.seqlen_new = t.k.size(0);
    p.cu_seqlens_new = t.cu_seqlens_new.int32_vector(p.num_seqs + 1, "num_seqs + 1");
  } else {
    p.num_seqs = t.k.size(0);
    p.seqlen_new = t.k.size(1);
  }
  p.num_heads_kv = t.k.size(-2);
  p.head_dim = t.k.size(-1);
  p.head_dim_v = t.v.size(-1);
  p.k_new = t.k.rows();
  p.v_new = t.v.rows();
}

// Queries have lengths of their own; with slot_mapping there is one query row for each new row instead.
void read_queries(const Tensors &t, flashspark_append_params &p) {
  if (!t.q) {
    for (const Tensor &other : {t.cu_seqlens_q, t.seqused_q}) {
      if (other) fail_value(other.name(), "given", "must be None without q");
    }
    return;
  }
  const bool varlen = static_cast<bool>(t.cu_seqlens_q), slots = static_cast<bool>(t.slot_mapping);
  t.q.require_ndim({varlen || slots ? 3 : 4}, slots    ? "(total, num_heads, head_dim) with slot_mapping"
                                              : varlen ? "(total_q, num_heads, head_dim) with cu_seqlens_q"
                                                       : "(num_seqs, seqlen_q, num_heads, head_dim)");
  if (slots) {
    t.q.require_size(0, t.k.size(0), "k's");
    p.total_q = p.total_new;
  } else if (varlen) {
    p.cu_seqlens_q = t.cu_seqlens_q.int32_vector(p.num_seqs + 1, "num_seqs + 1");
    p.total_q = p.seqlen_q = t.q.size(0);
  } else {
    t.q.require_size(0, p.num_seqs, "the number of sequences");
    p.seqlen_q = t.q.size(1);
  }
  t.q.require_size(-1, p.head_dim, "k's head size");
  p.num_heads_q = t.q.size(-2);
  p.q = t.q.rows();
}

void read_cache(const Tensors &t, flashspark_append_params &p) {
  t.k_cache.require_ndim({4}, "(num_seqs, seqlen, num_heads_kv, head_dim) or (num_pages, page_size, ..)");
  t.v_cache.require_ndim({4}, "of 4 dimensions, as k_cache");
  for (int32_t i = 0; i < 3; ++i) t.v_cache.require_size(i, t.k_cache.size(i), "k_cache's");
  t.k_cache.require_size(2, p.num_heads_kv, "k's heads");
  t.k_cache.require_size(3, p.head_dim, "k's head size");
  t.v_cache.require_size(3, p.head_dim_v, "v's head size");
  p.k_cache = t.k_cache.rows();
  p.v_cache = t.v_cache.rows();
  p.kv_batch_index = t.kv_batch_index.int32_vector(p.num_seqs, "the number of sequences");
  const bool indexed = static_cast<bool>(t.kv_batch_index);
  if (t.slot_mapping) {
    p.num_pages = t.k_cache.size(0);
    p.page_size = t.k_cache.size(1);
    return;
  }
  if (!t.page_table) {
    if (!indexed) t.k_cache.require_size(0, p.num_seqs, "the number of sequences");
    p.num_cache_rows = t.k_cache.size(0);
    p.seqlen_cache = t.k_cache.size(1);
    return;
  }
  t.page_table.require_ndim({2}, "(num_seqs, pages per sequence)");
  if (!indexed) t.page_table.require_size(0, p.num_seqs, "the number of sequences");
  t.page_table.require_unit_stride();
  p.page_table = t.page_table.int32_data();
  p.page_table_stride = t.page_table.size(0) > 1 ? t.page_table.stride(0) : t.page_table.size(1);
  p.num_page_slots = t.page_table.size(1);
  t.page_table.require_rows();
  p.num_cache_rows = t.page_table.size(0);
  p.num_pages = t.k_cache.size(0);
  p.page_size = t.k_cache.size(1);
}

// Rows may have a stride wider than themselves, as the halves of vLLM's cos_sin_cache do.
void read_rotary(const Tensor &cos, const Tensor &sin, const Tensor &positions, flashspark_append_params &p) {
  if (positions) {
    p.rotary_positions = int64_elements(positions);
    if (positions.size(0) < p.total_new) {
      fail_value("rotary_positions.shape[0]", std::to_string(positions.size(0)),
                 "must be at least slot_mapping's length, " + std::to_string(p.total_new));
    }
  }
  if (!cos && !sin) return;
  if (!cos || !sin) fail_value(cos ? "rotary_sin" : "rotary_cos", "None", "cos and sin go together");
  cos.require_ndim({2}, "(positions, rotary_dim / 2)");
  sin.require_ndim({2}, "(positions, rotary_dim / 2)");
  sin.require_size(0, cos.size(0), "rotary_cos's");
  sin.require_size(1, cos.size(1), "rotary_cos's");
  cos.require_float();
  if (sin.dtype() != cos.dtype()) fail_type("rotary_sin.dtype", sin.dtype_text(), "must be rotary_cos's");
  cos.require_unit_stride();
  sin.require_unit_stride();
  if (cos.size(0) > 1) {
    if (cos.stride(0) < cos.size(1)) {
      fail_value("rotary_cos.stride(0)", std::to_string(cos.stride(0)),
                 "must be at least the row's length, " + std::to_string(cos.size(1)));
    }
    p.rotary_stride = cos.stride(0);
    if (sin.stride(0) != cos.stride(0)) {
      fail_value("rotary_sin.stride(0)", std::to_string(sin.stride(0)),
                 "must be rotary_cos's, " + std::to_string(cos.stride(0)));
    }
  }
  p.rotary_cos = cos.data();
  p.rotary_sin = sin.data();
  p.rotary_dtype = cos.dtype();
  p.seqlen_rotary = cos.size(0);
  p.rotary_dim = 2 * cos.size(1);
}

}  // namespace

void append_kv(Reader &args) {
  flashspark_append_params p;
  flashspark_append_params_init(&p);
  args.set_names(append::kNames, std::size(append::kNames));
  Tensors t;
  const int64_t stored_as = args.integer(A::stored_as, 0);
  t.k = args.tensor(A::k, stored_type(stored_as, kStoredK));
  t.v = args.tensor(A::v, stored_type(stored_as, kStoredV));
  t.k_cache = args.tensor(A::k_cache, stored_type(stored_as, kStoredKCache));
  t.v_cache = args.tensor(A::v_cache, stored_type(stored_as, kStoredVCache));
  t.q = args.optional_tensor(A::q, stored_type(stored_as, kStoredQ));
  const Tensor cos = args.optional_tensor(A::rotary_cos, stored_type(stored_as, kStoredCos));
  const Tensor sin = args.optional_tensor(A::rotary_sin, stored_type(stored_as, kStoredSin));
  const Tensor seqlens = args.optional_tensor(A::cache_seqlens), leftpad = args.optional_tensor(A::cache_leftpad);
  const Tensor rotary_seqlens = args.optional_tensor(A::rotary_seqlens);
  t.seqused_q = args.optional_tensor(A::seqused_q);
  t.cu_seqlens_new = args.optional_tensor(A::cu_seqlens_k_new);
  t.cu_seqlens_q = args.optional_tensor(A::cu_seqlens_q);
  // Packed rows of q without offsets of their own have the offsets of the new rows.
  if (t.q && t.q.ndim() == 3 && !t.cu_seqlens_q && !t.slot_mapping) t.cu_seqlens_q = t.cu_seqlens_new;
  t.page_table = args.optional_tensor(A::block_table);
  t.kv_batch_index = args.optional_tensor(A::cache_batch_idx);
  t.slot_mapping = args.optional_tensor(A::slot_mapping);
  t.rotary_positions = args.optional_tensor(A::rotary_positions);
  if (t.slot_mapping) {
    for (const Tensor &other : {seqlens, t.cu_seqlens_new, t.cu_seqlens_q, t.seqused_q, t.page_table, t.kv_batch_index,
                                leftpad, rotary_seqlens}) {
      if (other) fail_value(other.name(), "given", "must be None when slot_mapping is given");
    }
    if (cos && !t.rotary_positions)
      fail_value("rotary_positions", "None", "must be given with slot_mapping and rotary_cos: a slot has no position");
  }

  read_new_rows(t, p);
  read_queries(t, p);
  read_cache(t, p);
  read_rotary(cos, sin, t.rotary_positions, p);
  const char *one_per_sequence = "the number of sequences";
  p.seqlens = seqlens.int32_vector(p.num_seqs, one_per_sequence);
  p.rotary_seqlens = rotary_seqlens.int32_vector(p.num_seqs, one_per_sequence);
  p.seqused_q = t.seqused_q.int32_vector(p.num_seqs, one_per_sequence);
  leftpad.int32_vector(p.num_seqs, one_per_sequence);  // checked as in the attention, and otherwise ignored
  p.k_descale = args.optional_tensor(A::k_descale).per_head_scale(p.num_seqs, p.num_heads_kv);
  p.v_descale = args.optional_tensor(A::v_descale).per_head_scale(p.num_seqs, p.num_heads_kv);
  p.rotary_interleaved = args.flag(A::rotary_interleaved, 1);
  p.q_rotary_per_token = args.flag(A::q_rotary_per_token, 1);
  p.check_device = args.flag(A::check_device, 0);
  args.set_device(p);
  const flashspark_status status = flashspark_append_kv(&p);
  if (status == FLASHSPARK_OK) return;
  throw CallError{error_kind(status), in_callers_words(flashspark_last_error(), kAppendNames, kCache)};
}

}  // namespace flashspark::ffi
