// The backward kernels against the formula: every kernel, every feature, in allocations of exact size.
#include <gtest/gtest.h>

#include <cmath>

#include "backward/problem.hpp"
#include "dtype.hpp"

namespace flashspark::emulator {
namespace {

enum class Kernels { all, smallest };  // smallest: what kernels have in common is tried with the quickest

// Runs every kernel that can take it, with a head as wide as the kernel's unless the spec has another.
void check(BackwardSpec spec, uint64_t seed, Kernels which = Kernels::all, bool own_width = true) {
  for (const BackwardKernel &kernel : backward_kernels()) {
    if (which == Kernels::smallest && kernel.instance->head_dim > 64) continue;
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
  check(s, 1);
}

TEST(Backward, RaggedTiles) {
  BackwardSpec s;
  for (const int32_t tokens : {1, 17, 70}) {
    for (const int32_t keys : {1, 33, 130}) {
      s.tokens = {tokens}, s.keys = {keys};
      check(s, static_cast<uint64_t>(tokens * 1000 + keys));
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
      check(s, ++seed);
    }
  }
}

TEST(Backward, NarrowHeads) {
  for (const int64_t width : {8, 40, 64, 80, 104, 136, 200}) {
    BackwardSpec s;
    s.head_dim = width, s.head_dim_v = width == 80 ? 72 : width == 200 ? 128 : width;
    s.tokens = {70}, s.keys = {130};
    check(s, static_cast<uint64_t>(width), Kernels::all, false);
  }
}

TEST(Backward, SharedKeys) {
  BackwardSpec s;
  s.tokens = {70, 20}, s.keys = {130, 260};
  s.heads_q = 6, s.heads_kv = 2, s.causal = true;
  check(s, 3);
  s.heads_q = 3, s.heads_kv = 1, s.heads_first = true;
  check(s, 4);
}

TEST(Backward, Sequences) {
  uint64_t seed = 50;
  for (const bool varlen_q : {false, true}) {
    for (const bool varlen_k : {false, true}) {
      for (const bool unused : {false, true}) {
        BackwardSpec s;
        s.tokens = {70, 0, 3, 129}, s.keys = {40, 70, 0, 129};
        s.varlen_q = varlen_q, s.varlen_k = varlen_k, s.unused_rows = unused;
        s.causal = varlen_q, s.heads_q = 2;  // a causal mask alone drops keys past the last one
        check(s, ++seed, Kernels::smallest);
      }
    }
  }
  // More sequences than lanes, most of them short.
  BackwardSpec s;
  s.tokens.assign(40, 2), s.keys.assign(40, 3);
  s.tokens[35] = 70, s.keys[35] = 140;
  s.varlen_q = s.varlen_k = true;
  check(s, ++seed, Kernels::smallest);
}

TEST(Backward, CausalBySequence) {
  BackwardSpec s;
  s.tokens = {70, 70}, s.keys = {90, 90}, s.causal_per_seq = true;
  check(s, 70, Kernels::smallest);
}

TEST(Backward, LseAndSinks) {
  BackwardSpec s;
  s.tokens = {70, 100}, s.keys = {90, 60}, s.heads_q = 2, s.causal = true;
  s.dlse = true;
  check(s, 80, Kernels::smallest);
  s.sinks = true;
  check(s, 81, Kernels::smallest);
  s.varlen_q = s.varlen_k = s.unused_rows = true;
  check(s, 82, Kernels::smallest);
}

// Rows whose lse says so, whatever keys the call has: of a part of the keys, where the whole row keeps none.
TEST(Backward, RowsWithoutKeys) {
  BackwardSpec s;
  s.tokens = {70}, s.keys = {130};
  s.without_keys = true;
  check(s, 85);
  s.tokens = {70, 33}, s.keys = {90, 60}, s.dlse = s.sinks = true;
  check(s, 86, Kernels::smallest);
}

// What dQ's sums hold there is 0 times infinity.
TEST(Backward, UnusedRowsBesideInfiniteValues) {
  BackwardSpec s;
  s.tokens = {70, 20}, s.keys = {40, 70};
  s.varlen_q = s.varlen_k = s.unused_rows = true;
  for (const BackwardKernel &kernel : backward_kernels()) {
    if (kernel.instance->head_dim > 64) continue;
    s.dtype = kernel.dtype;
    BackwardProblem problem(s, 87);
    const flashspark_attention_params &p = problem.params.forward;
    for (int64_t n = 0; n < p.total_k * s.heads_kv * s.head_dim_v; ++n)
      store_from_float(p.v.data, n, p.v.dtype, INFINITY);
    problem.run(kernel, 87);
    for (int64_t row = 0; row < p.total_q; ++row) {
      bool used = false;
      for (size_t b = 0; b < s.tokens.size(); ++b)
        used |= row >= p.cu_seqlens_q[b] && row < p.cu_seqlens_q[b] + s.tokens[b];
      for (int64_t n = row * s.heads_q * s.head_dim; !used && n < (row + 1) * s.heads_q * s.head_dim; ++n)
        ASSERT_EQ(load_as_float(problem.params.dq.data, n, p.q.dtype), 0) << name_of(kernel) << ", row " << row;
    }
  }
}

TEST(Backward, Softcap) {
  BackwardSpec s;
  s.tokens = {70}, s.keys = {150}, s.causal = true;
  s.softcap = 2.0f;
  check(s, 90);
  s.softcap = 20.0f, s.spread = 4;
  check(s, 91);
}

TEST(Backward, Dropout) {
  uint64_t seed = 100;
  for (const float p : {0.1f, 0.5f, 0.9f}) {
    BackwardSpec s;
    s.tokens = {70, 30}, s.keys = {150, 200}, s.heads_q = 4, s.heads_kv = 2;
    s.dropout_p = p;
    check(s, ++seed);
    s.causal = true, s.softcap = 5;
    check(s, ++seed);
    s.varlen_q = s.varlen_k = true;
    check(s, ++seed);
  }
}

TEST(Backward, PeakedScores) {
  BackwardSpec s;
  s.tokens = {130}, s.keys = {130}, s.causal = true;
  s.spread = 8;
  check(s, 110);
}

TEST(Backward, NotWanted) {
  for (int n = 0; n < 7; ++n) {
    BackwardSpec s;
    s.tokens = {70}, s.keys = {130};
    s.wanted_q = n & 1, s.wanted_k = n & 2, s.wanted_v = n & 4;
    check(s, 120, Kernels::smallest);
  }
}

}  // namespace
}  // namespace flashspark::emulator
