#include "cuda/arguments.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "dtype.hpp"

namespace flashspark::cuda {
namespace {

// cp.async moves 16 aligned bytes: eight numbers, sixteen of e4m3. Of q in e4m3 eight bytes are read at once.
std::string misaligned(const char *name, const flashspark_tensor &t, int64_t numbers, bool batches, int64_t tokens,
                       int64_t heads) {
  const auto text = [&](const char *what, int64_t value) {
    return std::string(name) + " " + what + " " + std::to_string(value);
  };
  const int64_t unit = numbers * static_cast<int64_t>(dtype_size(t.dtype));
  const std::string why = " (the kernels copy " + std::to_string(unit) + " aligned bytes)";
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(unit));
  if (address != 0) return text(("address % " + std::to_string(unit) + " =").c_str(), address) + why;
  const std::string rule = " is not a multiple of " + std::to_string(numbers) + " elements" + why;
  if (batches && t.batch_stride % numbers != 0) return text("batch_stride", t.batch_stride) + rule;
  if (tokens > 1 && t.token_stride % numbers != 0) return text("token_stride", t.token_stride) + rule;
  if (heads > 1 && t.head_stride % numbers != 0) return text("head_stride", t.head_stride) + rule;
  return {};
}

int32_t window_of(int64_t window) {
  return static_cast<int32_t>(window < 0 ? kMaxTokens : std::min(window, kMaxTokens));
}

// None: some page lies further off than 31 bits of units reach, with strides of whole rows terabytes away.
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

}  // namespace

bool dequantizes_kv(const Params &p) {
  return p.k.dtype == FLASHSPARK_FLOAT8_E4M3;
}

Sizes sizes_of(const Params &p) {
  const int64_t group = p.num_heads_q / p.num_heads_kv;
  const bool varlen = is_varlen_q(p);
  return {group, p.max_seqlen_q * group, varlen ? p.num_heads_kv : p.num_seqs * p.num_heads_kv,
          varlen ? p.total_q : p.num_seqs * p.max_seqlen_q};
}

int64_t kv_bytes(const Params &p, int64_t keys) {
  return keys * (p.head_dim + p.head_dim_v) * static_cast<int64_t>(dtype_size(p.k.dtype));
}

int64_t key_rows(const Params &p) {
  // Without pages or batches there is nothing that a page number or batch index could name.
  if (is_paged(p)) return p.num_pages == 0 ? 0 : std::min(p.num_page_slots * p.page_size, kMaxTokens);
  if (is_varlen_k(p)) return p.total_k;
  return p.max_seqlen_k;
}

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

ForwardArguments arguments_of(const Params &p, const Sizes &sizes, ScoreMod score_mod) {
  ForwardArguments a{};
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
  a.num_seqs = static_cast<int32_t>(p.num_seqs);
  a.num_heads_kv = static_cast<int32_t>(p.num_heads_kv);
  a.head_dim = static_cast<int32_t>(p.head_dim);
  a.head_dim_v = static_cast<int32_t>(p.head_dim_v);
  // No sequence is longer than all rows there are.
  a.max_seqlen_q = static_cast<int32_t>(is_varlen_q(p) ? std::min(p.max_seqlen_q, p.total_q) : p.max_seqlen_q);
  a.max_seqlen_k = static_cast<int32_t>(p.max_seqlen_k);
  a.group = make_divisor(static_cast<uint32_t>(sizes.group));
  a.total_q = static_cast<int32_t>(p.total_q);
  a.key_rows = static_cast<int32_t>(key_rows(p));
  a.last_batch = static_cast<int32_t>(std::max<int64_t>(num_kv_seqs(p) - 1, 0));
  a.last_page = static_cast<int32_t>(std::max<int64_t>(p.num_pages - 1, 0));
  if (is_paged(p)) {
    a.page_size = make_divisor(static_cast<uint32_t>(p.page_size));
    a.k_pages = page_steps(p, p.k).value_or(PageSteps{});
    a.v_pages = page_steps(p, p.v).value_or(PageSteps{});
  }
  a.cu_seqlens_q = p.cu_seqlens_q;
  a.cu_seqlens_k = p.cu_seqlens_k;
  a.seqused_q = p.seqused_q;
  a.seqused_k = p.seqused_k;
  a.leftpad_k = p.leftpad_k;
  a.kv_batch_index = p.kv_batch_index;
  a.page_table = p.page_table;
  a.page_table_stride = p.page_table_stride;
  if (dequantizes_kv(p)) {
    a.q_dtype = dtype_of(p.q.dtype);
    a.out_dtype = dtype_of(p.out.dtype);
    if (p.q.dtype == FLASHSPARK_FLOAT8_E4M3) a.q_descale = scale_of(p.q_descale);
    a.k_descale = scale_of(p.k_descale);
    a.v_descale = scale_of(p.v_descale);
  }
  // Masked scores are -inf, and 0 * -inf is NaN. With 1e-30 every other score still is 0 to the last bit of the result.
  const float scale = std::max(p.softmax_scale, 1e-30f);
  // Instances of kind `changed` turn to units of log2 themselves, after what asks for natural ones.
  a.softmax_scale = score_mod == ScoreMod::native ? scale : scale * 1.4426950408889634f;
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
  return a;
}

std::string unsupported(const Params &p) {
  std::string text;
  const auto add = [&](const std::string &what) {
    if (!what.empty()) text += (text.empty() ? "" : "; ") + what;
  };
  if (dequantizes_kv(p)) {
    const auto whole = [&](const char *what, int64_t width) {
      if (width % 16 != 0)
        add(std::string(what) + " " + std::to_string(width) + ": must be a multiple of 16 with float8_e4m3 k and v");
    };
    whole("head_dim", p.head_dim);
    if (p.head_dim_v != p.head_dim) whole("head_dim_v", p.head_dim_v);
  } else if (p.out.dtype != p.q.dtype && p.out.dtype != FLASHSPARK_FLOAT8_E4M3) {
    add("out must have q's type or be float8_e4m3 unless k and v are float8_e4m3");
  }
  const int64_t numbers = dequantizes_kv(p) ? 16 : 8;
  add(misaligned("q", p.q, 8, !is_varlen_q(p) && p.num_seqs > 1, is_varlen_q(p) ? p.total_q : p.max_seqlen_q,
                 p.num_heads_q));
  const int64_t rows_k = is_paged(p) ? p.page_size : (is_varlen_k(p) ? p.total_k : p.max_seqlen_k);
  const bool batches_k = !is_varlen_k(p) && (is_paged(p) ? p.num_pages : num_kv_seqs(p)) > 1;
  add(misaligned("k", p.k, numbers, batches_k, rows_k, p.num_heads_kv));
  add(misaligned("v", p.v, numbers, batches_k, rows_k, p.num_heads_kv));
  if (is_paged(p) && (!page_steps(p, p.k) || !page_steps(p, p.v)))
    add("k and v must lie within 2^31 units of the largest power of two that divides their strides");
  const Sizes sizes = sizes_of(p);
  const auto limit = [&](const char *what, int64_t value) {
    if (value > kMaxTokens) add(std::string(what) + " " + std::to_string(value) + " > 2^30");
  };
  limit("max_seqlen_q x group", sizes.rows);
  limit("total_q x group", sizes.tokens * sizes.group);
  limit("max_seqlen_k", p.max_seqlen_k);
  limit("total_k", p.total_k);
  limit("page_size", p.page_size);
  limit("num_seqs x num_heads_kv", p.num_seqs * p.num_heads_kv);
  return text;
}

}  // namespace flashspark::cuda
