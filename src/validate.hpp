#pragma once
#include <string>

#include "problem.hpp"

namespace flashspark {

// Throws Error naming the argument, its value and the rule. Reads only host-visible memory: the lengths and pages of a
// CPU problem are checked entry by entry, those of a GPU problem are the kernels' business.
void validate(const Params &p);
// The same of what flashspark_attention_schedule() looks at.
void validate_schedule(const Params &p);
void validate(const AppendParams &p);

// The part of it that reads what the pointers of validated params point to, all but tensors: offsets, lengths, batch
// indices, page numbers, slots, positions, and the numbers among the scores' arguments. validate() calls it for a CPU
// problem; for a GPU problem the pointers must be those of copies that the host can read.
void check_metadata(const Params &p);
void check_metadata(const AppendParams &p);

// Pieces that both share.
namespace check {
void version(uint32_t struct_size, size_t expected_size, uint32_t abi_version, const char *type);
void device(int32_t device, int32_t index);
void in_range(const char *argument, int64_t value, int64_t low, int64_t high);
void heads(int64_t num_heads_q, int64_t num_heads_kv);
void width(const char *argument, int64_t value);
void dtype(const char *argument, int32_t value, bool allow_fp8);
// A tensor of extents (batch, tokens, heads): pointer, alignment and that no offset overflows.
void tensor(const char *argument, const flashspark_tensor &t, int64_t batch, int64_t tokens, int64_t heads);
// No two elements of a written tensor share an address.
void distinct(const char *argument, const flashspark_tensor &t, int64_t batch, int64_t tokens, int64_t heads,
              int64_t width);
// A tensor that has passed tensor(), by the name of its argument.
struct View {
  const char *name;
  const flashspark_tensor &tensor;
  int64_t batch, tokens, heads, width;
};
// Both are the same elements in the same order.
bool same(const View &a, const View &b);
// Refuses a written tensor that shares an element with another one, or that cannot be told not to: where spans meet, it
// must lie beside the other within a stride that both keep to, as slices of one tensor do.
void apart(const View &written, const View &other, const char *rule);
void scale(const char *argument, const flashspark_scale &s);
void int32_pointer(const char *argument, const int32_t *pointer);
void int64_pointer(const char *argument, const int64_t *pointer);
void paging(int64_t num_pages, int64_t page_size, int64_t num_page_slots, int64_t page_table_stride, int64_t num_rows);
std::string at(const char *name, int64_t index);
}  // namespace check

}  // namespace flashspark
