// The Python functions' names for the fields of the C structs, used in error messages.
#pragma once

#include <cstring>
#include <string>

#include "signature.hpp"

namespace flashspark::ffi {

struct Name {
  const char *core;
  const char *face[kNumFaces];
};

// FlashAttention 4's lists, in the order of the native call (functions.hpp). flex_attention puts its own names in their
// place (python/flashspark/_flex_words.py).
inline constexpr const char *kListNames[] = {
    "block_sparse_tensors.mask_block_cnt", "block_sparse_tensors.mask_block_idx", "block_sparse_tensors.full_block_cnt",
    "block_sparse_tensors.full_block_idx"};

constexpr Name same(const char *core, const char *word) {
  return {core, {word, word, word}};
}

inline constexpr Name kAttentionNames[] = {
#define ATTENTION(kind, field, fallback, func, cache, forward) {#field, {func, cache, forward}},
#include "signature.def"
    {"num_heads_q", {"q.shape[-2]", "q.shape[-2]", "q.shape[-2]"}},
    {"num_heads_kv", {"k.shape[-2]", "k_cache.shape[-2]", "k.shape[-2]"}},
    {"head_dim", {"q.shape[-1]", "q.shape[-1]", "q.shape[-1]"}},
    {"head_dim_v", {"v.shape[-1]", "v_cache.shape[-1]", "v.shape[-1]"}},
    {"page_size", {"k.shape[1]", "k_cache.shape[1]", "k.shape[1]"}},
    {"num_pages", {"k.shape[0]", "k_cache.shape[0]", "k.shape[0]"}},
    {"num_page_slots", {"block_table.shape[1]", "block_table.shape[1]", "page_table.shape[1]"}},
    {"page_table_stride", {"block_table.stride(0)", "block_table.stride(0)", "page_table.stride(0)"}},
    {"num_kv_seqs", {"k.shape[0]", "k_cache.shape[0]", "k.shape[0]"}},
    {"sinks_dtype", {"sinks.dtype", "sinks.dtype", "learnable_sink.dtype"}},
    {"rel_dtype", {"rel_logits.dtype", "rel_logits.dtype", "rel_logits.dtype"}},
    {"rel_extent", {"rel_logits.shape[-1]", "rel_logits.shape[-1]", "rel_logits.shape[-1]"}},
    same("dropout_state", "rng_state"),
    same("masked_blocks.counts", kListNames[0]),
    same("masked_blocks.indices", kListNames[1]),
    same("full_blocks.counts", kListNames[2]),
    same("full_blocks.indices", kListNames[3]),
    same("masked_blocks.width", "block_sparse_tensors.mask_block_idx.shape[3]"),
    same("full_blocks.width", "block_sparse_tensors.full_block_idx.shape[3]"),
    same("block_batch", "block_sparse_tensors.mask_block_cnt.shape[0]"),
    same("block_heads", "block_sparse_tensors.mask_block_cnt.shape[1]"),
    same("num_blocks_q", "block_sparse_tensors.mask_block_cnt.shape[2]"),
    same("block_size_q", "block_sparse_tensors.block_size[0]"),
    same("block_size_k", "block_sparse_tensors.block_size[1]"),
};

inline constexpr Name kAppendNames[] = {
    {"k_new", {"k", "k", "k"}},
    {"v_new", {"v", "v", "v"}},
    {"seqlens", {"cache_seqlens", "cache_seqlens", "cache_seqlens"}},
    {"cu_seqlens_new", {"cu_seqlens_k_new", "cu_seqlens_k_new", "cu_seqlens_k_new"}},
    {"kv_batch_index", {"cache_batch_idx", "cache_batch_idx", "cache_batch_idx"}},
    {"leftpad_k", {"cache_leftpad", "cache_leftpad", "cache_leftpad"}},
    {"page_table", {"block_table", "block_table", "block_table"}},
    {"seqlen_q", {"q.shape[1]", "q.shape[1]", "q.shape[1]"}},
    {"num_heads_q", {"q.shape[-2]", "q.shape[-2]", "q.shape[-2]"}},
    {"num_heads_kv", {"k_cache.shape[-2]", "k_cache.shape[-2]", "k_cache.shape[-2]"}},
    {"head_dim", {"k_cache.shape[-1]", "k_cache.shape[-1]", "k_cache.shape[-1]"}},
    {"head_dim_v", {"v_cache.shape[-1]", "v_cache.shape[-1]", "v_cache.shape[-1]"}},
    {"page_size", {"k_cache.shape[1]", "k_cache.shape[1]", "k_cache.shape[1]"}},
    {"num_pages", {"k_cache.shape[0]", "k_cache.shape[0]", "k_cache.shape[0]"}},
    {"num_page_slots", {"block_table.shape[1]", "block_table.shape[1]", "block_table.shape[1]"}},
    {"page_table_stride", {"block_table.stride(0)", "block_table.stride(0)", "block_table.stride(0)"}},
    {"num_cache_rows", {"k_cache.shape[0]", "k_cache.shape[0]", "k_cache.shape[0]"}},
    {"rotary_dim", {"2 * rotary_cos.shape[1]", "2 * rotary_cos.shape[1]", "2 * rotary_cos.shape[1]"}},
    {"rotary_dtype", {"rotary_cos.dtype", "rotary_cos.dtype", "rotary_cos.dtype"}},
    {"seqlen_rotary", {"rotary_cos.shape[0]", "rotary_cos.shape[0]", "rotary_cos.shape[0]"}},
};

inline constexpr Name kScheduleNames[] = {
    {"num_seqs", {"batch_size"}},        {"seqused_k", {"cache_seqlens"}},
    {"leftpad_k", {"cache_leftpad"}},    {"kv_batch_index", {"cache_batch_idx"}},
    {"head_dim", {"headdim"}},           {"head_dim_v", {"headdim_v"}},
    {"window_left", {"window_size[0]"}}, {"window_right", {"window_size[1]"}},
    {"scheduler_metadata", {"out"}},     {"scheduler_metadata_size", {"out.shape[0]"}},
};

// Replaces the field at the start of an error text: "page_table[0][3] = 9: .." becomes "block_table[0][3] = 9: ..". Of
// several names at the start the longest counts: "masked_blocks.counts" rather than "masked_blocks".
template <size_t N>
std::string in_callers_words(const char *text, const Name (&names)[N], Face face) {
  const Name *found = nullptr;
  size_t longest = 0;
  for (const Name &name : names) {
    const size_t length = std::strlen(name.core);
    if (length <= longest || std::strncmp(name.core, text, length) != 0) continue;
    if (text[length] != '\0' && std::strchr("abcdefghijklmnopqrstuvwxyz_0123456789", text[length]) != nullptr) continue;
    found = &name, longest = length;
  }
  return found != nullptr ? found->face[face] + std::string(text + longest) : text;
}

}  // namespace flashspark::ffi
