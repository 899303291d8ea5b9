// A problem as the kernels take it: its fields in their types, and what they cannot take.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/shape.hpp"
#include "forward/arguments.hpp"
#include "forward/config.hpp"
#include "problem.hpp"

namespace flashspark::cuda {

// Fields of the interface as the kernels take them.
DType dtype_of(int32_t dtype);
Strides strides_of(const flashspark_tensor &t);
Scale scale_of(const flashspark_scale &s);

// Exact for every n < 2^31; 1 <= d <= 2^30.
Divisor make_divisor(uint32_t d);

// The fields that all operations have: sizes, and the arrays that say which rows and keys a sequence has.
template <class Arguments, class P>
void copy_lengths(const P &p, Arguments &a) {
  a.num_seqs = static_cast<int32_t>(p.num_seqs);
  a.num_heads_kv = static_cast<int32_t>(p.num_heads_kv);
  a.head_dim = static_cast<int32_t>(p.head_dim);
  a.head_dim_v = static_cast<int32_t>(p.head_dim_v);
  a.cu_seqlens_q = p.cu_seqlens_q;
  a.seqused_q = p.seqused_q;
  a.kv_batch_index = p.kv_batch_index;
  a.page_table = p.page_table;
  a.page_table_stride = p.page_table_stride;
}

// Everything but what a plan decides (tiles, splits, where partial results lie).
ForwardArguments arguments_of(const Params &p, const Shape &shape, ScoreMod score_mod);

// What the kernels cannot take of this problem, in words; empty if nothing.
std::string unsupported(const Params &p);

// Which field of a 16-bit tensor like q is not aligned as copies of 16 bytes ask, and its value; empty: none.
std::string misaligned_rows(const Params &p, const char *name, const flashspark_tensor &t);

}  // namespace flashspark::cuda
