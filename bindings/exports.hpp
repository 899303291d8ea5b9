// The functions that ffi.cpp exports. Each reads its arguments, calls the C interface and throws CallError on failure.
#pragma once

#include <string>

#include "args.hpp"

namespace flashspark::ffi {

const char *error_kind(flashspark_status status);  // the name of the Python exception for this status

// Sets scheduler_metadata and its size; does nothing for an absent tensor.
void read_scheduler_metadata(const Tensor &metadata, flashspark_attention_params &params);

void attention_forward(Reader &args);
std::string attention_explain(Reader &args);
void attention_validate(Reader &args);
void attention_backward(Reader &args);
std::string attention_backward_explain(Reader &args);
int64_t attention_schedule(Reader &args);  // the number of elements of scheduler_metadata
void append_kv(Reader &args);
void create_block_mask(Reader &args);

}  // namespace flashspark::ffi
