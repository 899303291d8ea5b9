// Attention problems from the fuzzer's bytes, shared by the targets of the forward and the backward pass.
#pragma once

#include <cstdint>
#include <vector>

#include "flashspark/flashspark.h"
#include "stream.hpp"

namespace flashspark::fuzz {

using P = flashspark_attention_params;

// Everything that the validator reads through a pointer.
struct Arrays {
  std::vector<int32_t> cu_q, cu_k, used_q, used_k, leftpad, kv_index, pages, causal, ranges, prefix_lens;
  std::vector<float> sinks, alibi, q_scale, k_scale, v_scale, output_scale{0.5f};
  std::vector<uint64_t> dropout_state{7, 1};
};

// An address for the n-th tensor, with nothing there and no other tensor near: the validator compares addresses but
// must not dereference them.
inline void *nowhere(uintptr_t n) {
  return reinterpret_cast<void *>((uintptr_t{1} << 46) + (n << 41));
}
constexpr uintptr_t kNumTensors = 6;  // of attention: q, k, v, out, lse, rel_logits

// Any params, more often than not nearly legal ones. All pointers but those into `arrays` lead nowhere.
struct Attention {
  explicit Attention(Stream &in);
  Attention(const Attention &) = delete;

  P params;
  Arrays arrays;
};

// Allocates tensors of exactly the size that the struct describes. Returns false if they are too large to try.
bool attach(P &p, Block (&blocks)[6]);

// Multiplications and additions, about.
double work(const P &p);

// Ends the process, which the fuzzer takes for a finding.
[[noreturn]] void complain(const char *what);

}  // namespace flashspark::fuzz
