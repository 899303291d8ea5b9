// What ffi.cpp exports, implemented next door. Each reads its arguments, calls the C interface and throws CallError.
#pragma once

#include <string>

#include "args.hpp"

namespace flashspark::ffi {

const char *error_kind(flashspark_status status);  // the Python exception that stands for this status

// scheduler_metadata and its size; an absent tensor leaves them as they are.
void read_schedule(const Tensor &metadata, flashspark_attention_params &params);

void attention_forward(Reader &args);
std::string attention_explain(Reader &args);
void attention_validate(Reader &args);
int64_t attention_schedule(Reader &args);  // elements of scheduler_metadata
void append_kv(Reader &args);

}  // namespace flashspark::ffi
