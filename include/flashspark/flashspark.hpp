// flashspark for C++20: the C interface with spans, defaults and a result type. Header only; exceptions are not used.
//
//   flashspark::Attention attention;
//   attention.q = flashspark::dense(q.data(), batch, seqlen_q, heads_q, head_dim);    // and k, v, out
//   attention.params.causal = 1;
//   if (auto result = attention.forward(); !result) std::puts(result.error().c_str());
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "flashspark/flashspark.h"

namespace flashspark {

// Success, or a status with the text that names the argument, its value and the rule.
class [[nodiscard]] Result {
 public:
  Result() = default;
  explicit Result(flashspark_status status) : status_(status) {
    if (status != FLASHSPARK_OK) error_ = flashspark_last_error();
  }
  explicit operator bool() const { return status_ == FLASHSPARK_OK; }
  flashspark_status status() const { return status_; }
  const std::string &error() const { return error_; }

 private:
  flashspark_status status_ = FLASHSPARK_OK;
  std::string error_;
};

// Storage types of 16- and 8-bit elements. Conversions are the caller's.
enum class bfloat16 : uint16_t {};
enum class float16 : uint16_t {};
enum class float8_e4m3 : uint8_t {};

template <class T>
constexpr flashspark_dtype dtype_of() {
  using U = std::remove_cv_t<T>;
  if constexpr (std::is_same_v<U, float>) return FLASHSPARK_FLOAT32;
  if constexpr (std::is_same_v<U, float16>) return FLASHSPARK_FLOAT16;
  if constexpr (std::is_same_v<U, bfloat16>) return FLASHSPARK_BFLOAT16;
  if constexpr (std::is_same_v<U, float8_e4m3>) return FLASHSPARK_FLOAT8_E4M3;
  static_assert(std::is_same_v<U, float> || std::is_same_v<U, float16> || std::is_same_v<U, bfloat16> ||
                    std::is_same_v<U, float8_e4m3>,
                "flashspark takes float, float16, bfloat16 and float8_e4m3");
}

// A tensor with its extents. Strides count elements; width elements are contiguous.
struct Tensor {
  flashspark_tensor view{};
  int64_t batch = 0, tokens = 0, heads = 0, width = 0;
};

// (batch, tokens, heads, width) in row-major order. A varlen tensor (total, heads, width) has batch 1; a paged cache
// (num_pages, page_size, heads, width) has batch num_pages.
template <class T>
Tensor dense(T *data, int64_t batch, int64_t tokens, int64_t heads, int64_t width) {
  void *pointer = const_cast<std::remove_const_t<T> *>(data);
  return {{pointer, tokens * heads * width, heads * width, width, dtype_of<T>(), 0}, batch, tokens, heads, width};
}

template <class T>
Tensor strided(T *data, int64_t batch, int64_t tokens, int64_t heads, int64_t width, int64_t batch_stride,
               int64_t token_stride, int64_t head_stride) {
  void *pointer = const_cast<std::remove_const_t<T> *>(data);
  return {{pointer, batch_stride, token_stride, head_stride, dtype_of<T>(), 0}, batch, tokens, heads, width};
}

namespace detail {

template <class P>
std::string explained(flashspark_status (*explain)(const P *, char *, size_t), const P &p) {
  std::string text(8192, '\0');
  const flashspark_status status = explain(&p, text.data(), text.size());
  text.resize(text.find('\0'));
  return status == FLASHSPARK_OK || !text.empty() ? text : std::string(flashspark_last_error());
}

}  // namespace detail

// A forward problem: tensors here, everything else in `params` (see flashspark.h). forward() and explain() first copy
// the tensors' extents into params: dense by default, varlen with cu_seqlens_q / cu_seqlens_k, paged with page_table
// (then also set num_page_slots and page_table_stride, num_kv_seqs with kv_batch_index, and max_seqlen_k, which is the
// whole table unless set).
class Attention {
 public:
  Attention() {
    flashspark_attention_params_init(&params);
    params.softmax_scale = -1.0f;  // stands for head_dim ** -0.5
  }

  Tensor q, k, v, out;
  flashspark_attention_params params;

  Result forward() const {
    const flashspark_attention_params p = filled();
    return Result(flashspark_attention_forward(&p));
  }

  // Which implementation would run, and why; or the error's text.
  std::string explain() const {
    const flashspark_attention_params p = filled();
    return detail::explained(flashspark_attention_explain, p);
  }

  flashspark_attention_params filled() const {
    flashspark_attention_params p = params;
    p.q = q.view;
    p.k = k.view;
    p.v = v.view;
    p.out = out.view;
    p.num_heads_q = q.heads;
    p.num_heads_kv = k.heads;
    p.head_dim = q.width;
    p.head_dim_v = v.width;
    if (p.softmax_scale == -1.0f) p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(q.width));
    if (p.cu_seqlens_q != nullptr) {
      p.total_q = q.tokens;
    } else {
      p.num_seqs = q.batch;
      p.max_seqlen_q = q.tokens;
    }
    if (p.page_table != nullptr) {
      p.num_pages = k.batch;
      p.page_size = k.tokens;
      if (p.max_seqlen_k == 0) p.max_seqlen_k = p.num_page_slots * p.page_size;
    } else if (p.cu_seqlens_k != nullptr) {
      p.total_k = k.tokens;
    } else {
      p.num_kv_seqs = k.batch;
      p.max_seqlen_k = k.tokens;
    }
    return p;
  }
};

// The gradients of a forward problem: dout and those of dq, dk and dv that are wanted here, dlse and the other
// gradients in `params` (see flashspark.h). `forward` is the problem as it was called, with out and with lse.
class AttentionBackward {
 public:
  explicit AttentionBackward(const Attention &forward_problem) : forward(forward_problem) {
    flashspark_attention_backward_params_init(&params);
  }

  Attention forward;
  Tensor dout, dq, dk, dv;
  flashspark_attention_backward_params params;

  Result backward() const {
    const flashspark_attention_backward_params p = filled();
    return Result(flashspark_attention_backward(&p));
  }

  std::string explain() const {
    const flashspark_attention_backward_params p = filled();
    return detail::explained(flashspark_attention_backward_explain, p);
  }

  flashspark_attention_backward_params filled() const {
    flashspark_attention_backward_params p = params;
    p.forward = forward.filled();
    p.dout = dout.view;
    p.dq = dq.view;
    p.dk = dk.view;
    p.dv = dv.view;
    return p;
  }
};

}  // namespace flashspark
