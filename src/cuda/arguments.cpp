#include "cuda/arguments.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "dtype.hpp"

namespace flashspark::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
// Masked scores are -inf, and 0 * -inf is NaN. With this factor every other score is 0 to the last bit of the result.
constexpr float kMinSoftmaxScale = 1e-30f;

// The fields of a tensor whose alignment counts: strides of a dimension of one element are never used.
struct Aligned {
  const char *name;
  const flashspark_tensor &tensor;
  int64_t elements;             // that a kernel copies at once: 16 bytes by cp.async, or 8 of q in e4m3
  bool batches, tokens, heads;  // there are several
};

// Which field is not aligned, and its value; empty, and no memory taken, if all are.
std::string misaligned(const Aligned &a) {
  const flashspark_tensor &t = a.tensor;
  const int64_t bytes = a.elements * static_cast<int64_t>(dtype_size(t.dtype));
  const auto why = [&] { return " (the kernels copy " + std::to_string(bytes) + " aligned bytes)"; };
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(bytes));
  if (address != 0)
    return std::string(a.name) + " address % " + std::to_string(bytes) + " = " + std::to_string(address) + why();
  const auto stride = [&](const char *field, int64_t value) {
    return std::string(a.name) + " " + field + " " + std::to_string(value) + " is not a multiple of " +
           std::to_string(a.elements) + " elements" + why();
  };
  if (a.batches && t.batch_stride % a.elements != 0) return stride("batch_stride", t.batch_stride);
  if (a.tokens && t.token_stride % a.elements != 0) return stride("token_stride", t.token_stride);
  if (a.heads && t.head_stride % a.elements != 0) return stride("head_stride", t.head_stride);
  return {};
}

int32_t window_of(int64_t window) {
  return static_cast<int32_t>(window < 0 ? kMaxTokens : std::min(window, kMaxTokens));
}

// None: some page is further away than 31 bits of units reach.
std::optional<PageSteps> page_steps(const Params &p, const flashspark_tensor &t) {
  const auto bytes = static_cast<int64_t>(dtype_size(t.dtype));
  const int64_t page = p.num_pages > 1 ? t.batch_stride * bytes : 0, slot = t.token_stride * bytes;
  const int64_t both = page | slot;
  const int64_t unit = both == 0 ? 1 : std::min<int64_t>(both & -both, int64_t{1} << 30);
  const int64_t furthest =
      std::abs(page / unit) * std::max<int64_t>(p.num_pages - 1, 0) + std::abs(slot / unit) * p.page_size;
  if (std::max(furthest, std::abs(page / unit)) > std::numeric_limits<int32_t>::max()) return std::nullopt;
  return PageSteps{static_cast<int32_t>(page / unit), static_cast<int32_t>(slot / unit), static_cast<int32_t>(unit)};
}

void set_tensors(const Params &p, ForwardArguments &a) {
  a.q = p.q.data;
  a.k = p.k.data;
  a.v = p.v.data;
  a.out = p.out.data;
  a.lse = p.lse;
  a.q_strides = strides_of(p.q);
  a.k_strides = strides_of(p.k);
  a.v_strides = strides_of(p.v);
  a.out_strides = strides_of(p.out);
  a.lse_strides = {p.lse_batch_stride, p.lse_token_stride, p.lse_head_stride};
  if (is_paged(p)) {
    a.k_pages = page_steps(p, p.k).value_or(PageSteps{});
    a.v_pages = page_steps(p, p.v).value_or(PageSteps{});
  }
}

void set_lengths(const Params &p, const Shape &shape, ForwardArguments &a) {
  copy_lengths(p, a);
  a.num_heads_kv = static_cast<int32_t>(shape.num_heads_kv);
  a.cu_seqlens_k = p.cu_seqlens_k;
  a.seqused_k = p.seqused_k;
  a.leftpad_k = p.leftpad_k;
  // No sequence is longer than all rows there are.
  a.max_seqlen_q = static_cast<int32_t>(shape.varlen_q ? std::min(p.max_seqlen_q, p.total_q) : p.max_seqlen_q);
  a.max_seqlen_k = static_cast<int32_t>(p.max_seqlen_k);
  a.group = make_divisor(static_cast<uint32_t>(shape.group));
  a.total_q = static_cast<int32_t>(p.total_q);
  a.key_rows = static_cast<int32_t>(shape.key_rows);
  a.last_batch = static_cast<int32_t>(std::max<int64_t>(num_kv_seqs(p) - 1, 0));
  a.last_page = static_cast<int32_t>(std::max<int64_t>(p.num_pages - 1, 0));
  if (is_paged(p)) a.page_size = make_divisor(static_cast<uint32_t>(p.page_size));
}

void set_scores(const Params &p, const Shape &shape, ScoreMod score_mod, ForwardArguments &a) {
  if (shape.dequantizes_kv) {
    a.q_dtype = dtype_of(p.q.dtype);
    a.out_dtype = dtype_of(p.out.dtype);
    if (p.q.dtype == FLASHSPARK_FLOAT8_E4M3) a.q_descale = scale_of(p.q_descale);
    a.k_descale = scale_of(p.k_descale);
    a.v_descale = scale_of(p.v_descale);
  }
  const float scale = std::max(p.softmax_scale, kMinSoftmaxScale);
  // A score modification works on scores in natural units, and its kernels turn to units of log2 behind it.
  const bool modified = score_mod != ScoreMod::none || p.score_mod.mod != nullptr;
  a.softmax_scale = modified ? scale : scale * kLog2e;
  a.softcap = p.softcap;
  a.sinks = p.sinks;
  a.sinks_dtype = dtype_of(p.sinks_dtype);
  a.rel_dtype = dtype_of(p.rel_dtype);
  a.rel_logits = p.rel_logits;
  a.rel_token_stride = p.rel_token_stride;
  a.rel_head_stride = p.rel_head_stride;
  a.rel_extent = static_cast<int32_t>(std::min(p.rel_extent, kMaxTokens));
  a.alibi_slopes = p.alibi_slopes;
  a.alibi_batch_stride = p.alibi_batch_stride;
}

void set_mask(const Params &p, ForwardArguments &a) {
  a.causal = p.causal;
  a.window_left = window_of(p.window_left);
  a.window_right = window_of(p.window_right);
  a.attention_chunk = static_cast<int32_t>(std::min(p.attention_chunk, kMaxTokens));
  a.causal_per_seq = p.causal_per_seq;
  a.prefix_mode = static_cast<PrefixMode>(p.prefix_mode);
  a.prefix_clamp_window = p.prefix_clamp_window;
  a.num_prefix_ranges = static_cast<int32_t>(p.num_prefix_ranges);
  a.prefix_ranges = p.prefix_ranges;
  a.rswa_window = p.rswa_window;
  a.rswa_prefix_lens = p.rswa_prefix_lens;
}

}  // namespace

DType dtype_of(int32_t dtype) {
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      return DType::float32;
    case FLASHSPARK_FLOAT16:
      return DType::float16;
    case FLASHSPARK_FLOAT8_E4M3:
      return DType::e4m3;
    default:
      return DType::bfloat16;
  }
}

Strides strides_of(const flashspark_tensor &t) {
  return {t.batch_stride, t.token_stride, t.head_stride};
}

Scale scale_of(const flashspark_scale &s) {
  return {s.data, s.batch_stride, s.head_stride};
}

Divisor make_divisor(uint32_t d) {
  Divisor result{d, 0, 0};
  while ((uint64_t{1} << result.shift) < d) ++result.shift;
  if ((uint64_t{1} << result.shift) == d) return result;  // a power of two: a shift alone
  // m = ceil(2^(31 + shift) / d) < 2^32; n < 2^31 makes floor(n m / 2^(31 + shift)) exact.
  result.multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + result.shift)) + d - 1) / d);
  --result.shift;
  return result;
}

ForwardArguments arguments_of(const Params &p, const Shape &shape, ScoreMod score_mod) {
  ForwardArguments a{};
  set_tensors(p, a);
  set_lengths(p, shape, a);
  set_scores(p, shape, score_mod, a);
  set_mask(p, a);
  return a;
}

std::string misaligned_rows(const Params &p, const char *name, const flashspark_tensor &t) {
  const bool varlen = is_varlen_q(p);
  const int64_t tokens = varlen ? p.total_q : p.max_seqlen_q;
  return misaligned({name, t, 8, !varlen && p.num_seqs > 1, tokens > 1, p.num_heads_q > 1});
}

std::string unsupported(const Params &p) {
  std::string text;
  const auto add = [&](const std::string &what) {
    if (!what.empty()) text += (text.empty() ? "" : "; ") + what;
  };
  const Shape shape = shape_of(p);
  if (shape.dequantizes_kv) {
    const auto whole = [&](const char *what, int64_t width) {
      if (width % 16 != 0)
        add(std::string(what) + " " + std::to_string(width) + ": must be a multiple of 16 with float8_e4m3 k and v");
    };
    whole("head_dim", p.head_dim);
    if (p.head_dim_v != p.head_dim) whole("head_dim_v", p.head_dim_v);
  } else if (p.out.dtype != p.q.dtype && p.out.dtype != FLASHSPARK_FLOAT8_E4M3) {
    add("out must have q's type or be float8_e4m3 unless k and v are float8_e4m3");
  }
  add(misaligned_rows(p, "q", p.q));
  const int64_t tokens_k = is_paged(p) ? p.page_size : (is_varlen_k(p) ? p.total_k : p.max_seqlen_k);
  const bool batches_k = !is_varlen_k(p) && (is_paged(p) ? p.num_pages : num_kv_seqs(p)) > 1;
  const int64_t elements = shape.dequantizes_kv ? 16 : 8;
  add(misaligned({"k", p.k, elements, batches_k, tokens_k > 1, p.num_heads_kv > 1}));
  add(misaligned({"v", p.v, elements, batches_k, tokens_k > 1, p.num_heads_kv > 1}));
  if (is_paged(p) && (!page_steps(p, p.k) || !page_steps(p, p.v)))
    add("k and v must lie within 2^31 units of the largest power of two that divides their strides");
  const auto limit = [&](const char *what, int64_t value) {
    if (value > kMaxTokens) add(std::string(what) + " " + std::to_string(value) + " > 2^30");
  };
  limit("max_seqlen_q x group", shape.rows);
  limit("total_q x group", shape.tokens * shape.group);
  limit("max_seqlen_k", p.max_seqlen_k);
  limit("total_k", p.total_k);
  limit("page_size", p.page_size);
  limit("num_seqs x num_heads_kv", shape.seq_heads);
  return text;
}

}  // namespace flashspark::cuda
