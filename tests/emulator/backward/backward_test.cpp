// The backward kernels against the formula: every kernel, every feature, in allocations of exact size.
#include <gtest/gtest.h>

#include "backward/problem.hpp"

namespace flashspark::emulator {
namespace {

// Runs every kernel that can take it, with a head as wide as the kernel's unless the spec has another.
void check_all(BackwardSpec spec, uint64_t seed, bool own_width = true) {
  for (const BackwardKernel &kernel : backward_kernels()) {
    if (own_width) spec.head_dim = kernel.instance->head_dim, spec.head_dim_v = kernel.instance->head_dim_v;
    Params p{};
    p.head_dim = spec.head_dim, p.head_dim_v = spec.head_dim_v;
    p.softcap = spec.softcap, p.dropout_p = spec.dropout_p;
    if (!cuda::fits(*kernel.instance, p)) continue;
    Counters counters;
    EXPECT_EQ(check_backward(spec, kernel, seed, &counters), "");
    EXPECT_EQ(counters.bank_conflicts, 0u) << name_of(kernel);
  }
}

TEST(Backward, WholeTiles) {
  BackwardSpec s;
  s.tokens = {128}, s.keys = {128};
  check_all(s, 1);
}

TEST(Backward, RaggedTiles) {
  BackwardSpec s;
  for (const int32_t tokens : {1, 17, 70}) {
    for (const int32_t keys : {1, 33, 130}) {
      s.tokens = {tokens}, s.keys = {keys};
      check_all(s, static_cast<uint64_t>(tokens * 1000 + keys));
    }
  }
}

TEST(Backward, Masks) {
  struct Mask {
    bool causal;
    int64_t left, right;
  };
  uint64_t seed = 10;
  for (const Mask &mask :
       {Mask{true, -1, -1}, Mask{true, 40, -1}, Mask{false, 20, 10}, Mask{false, -1, 5}, Mask{false, 7, -1}}) {
    for (const auto &[tokens, keys] : {std::pair{100, 140}, std::pair{150, 90}, std::pair{64, 256}}) {
      BackwardSpec s;
      s.tokens = {tokens}, s.keys = {keys};
      s.causal = mask.causal, s.window_left = mask.left, s.window_right = mask.right;
      check_all(s, ++seed);
    }
  }
}

}  // namespace
}  // namespace flashspark::emulator
