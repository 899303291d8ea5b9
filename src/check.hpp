// The rules that attention and append share. Each throws Error with the argument, its value and the rule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "flashspark/flashspark.h"

namespace flashspark::check {

void version(uint32_t struct_size, size_t expected_size, uint32_t abi_version, const char *type);
void device(int32_t device, int32_t index);
void in_range(const char *argument, int64_t value, int64_t low, int64_t high);
void heads(int64_t num_heads_q, int64_t num_heads_kv);
void width(const char *argument, int64_t value);
void dtype(const char *argument, int32_t value, bool allow_fp8);
// `other` names the argument whose dtype is `wanted`.
void same_dtype(const char *argument, int32_t dtype, const char *other, int32_t wanted);

// A pointer that must be NULL or must be given, with the rule that says when.
void absent(const char *argument, const void *pointer, const char *rule);
void present(const char *argument, const void *pointer, const char *rule);
// Alignment of arrays on the device; NULL is aligned.
template <class T>
using Arrays = std::initializer_list<std::pair<const char *, const T *>>;
void aligned_arrays(Arrays<int32_t> arrays);
void aligned_arrays(Arrays<int64_t> arrays);
void aligned_arrays(Arrays<uint64_t> arrays);

// A tensor of extents (batch, tokens, heads): pointer, alignment and that no offset overflows.
void tensor(const char *argument, const flashspark_tensor &t, int64_t batch, int64_t tokens, int64_t heads);
// No two elements of a written tensor share an address.
void distinct(const char *argument, const flashspark_tensor &t, int64_t batch, int64_t tokens, int64_t heads,
              int64_t width);
void scale(const char *argument, const flashspark_scale &s);
void paging(int64_t num_pages, int64_t page_size, int64_t num_page_slots, int64_t page_table_stride, int64_t num_rows);

// A tensor that has passed tensor(), with the name of its argument.
struct View {
  const char *name;
  const flashspark_tensor &tensor;
  int64_t batch, tokens, heads, width;
};
// Whether both are the same elements in the same order.
bool same(const View &a, const View &b);
// Refuses a written tensor that shares an element with another one, or for which that cannot be ruled out: where their
// spans meet, it must lie beside the other within a stride that both have in common, as slices of one tensor do.
void apart(const View &written, const View &other, const char *rule);

std::string at(const char *name, int64_t index);  // "name[index]"

}  // namespace flashspark::check
