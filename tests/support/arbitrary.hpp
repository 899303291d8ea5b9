// Random problems and layouts for property tests. Sizes and switches are drawn one by one, so that a failing case
// shrinks to a small one; tensor values come from a seed.
#pragma once

#include <rapidcheck.h>

#include "support/model.hpp"

namespace flashspark::test {

struct Wanted {
  bool masks = true;     // causal, windows, prefix ranges, R-SWA
  bool biases = true;    // softcap, sinks, rel_logits, ALiBi
  bool dtypes = true;    // other than float32 (out stays float32, so that errors show)
  bool dropout = false;  // which asks for the number of a sequence, of a query token and of a key
  int64_t longest_k = 150;
};

Problem arbitrary_problem(const Wanted &wanted = {});
Layout arbitrary_layout();

// Keys that raise the running maximum of every row by up to 30 at random positions, as in real activations.
void make_peaked(Problem &problem);

}  // namespace flashspark::test
