// Whether params keep the rules of flashspark.h.
#pragma once

#include "problem.hpp"

namespace flashspark {

// Throws Error with the argument, its value and the rule. Only memory that the host can read is read: the lengths and
// pages of a CPU problem are checked entry by entry, those of a GPU problem are clamped by its kernels.
void validate(const Params &p);
void validate(const BackwardParams &p);
void validate(const AppendParams &p);
void validate(const BlockMaskParams &p);
// What flashspark_attention_schedule() looks at.
void validate_schedule(const Params &p);

// The part that reads what the pointers of validated params point to, except tensors: offsets, lengths, batch indices,
// page numbers, slots, positions, and the numbers among the scores' arguments. validate() calls it for a CPU problem;
// for a GPU problem the pointers must be those of copies that the host can read.
void check_metadata(const Params &p);
void check_metadata(const BackwardParams &p);
void check_metadata(const AppendParams &p);

}  // namespace flashspark
