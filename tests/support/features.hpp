// Each feature of the problem description on its own, as an edit of a plain problem, and the layouts to cross them
// with.
#pragma once

#include <string>
#include <vector>

#include "support/model.hpp"

namespace flashspark::test {

struct Feature {
  const char *name;
  void (*dress)(Problem &, std::mt19937_64 &);   // before values are drawn: dtypes, head sizes, masks of the problem
  void (*finish)(Problem &, std::mt19937_64 &);  // after values are drawn: what depends on the sequences
};

const std::vector<Feature> &features();
const std::vector<std::pair<const char *, Layout>> &layouts();

// Sequences of different lengths, including a single query, no query, no key, and more queries than keys.
Problem problem_with(const Feature &feature, uint64_t seed);

}  // namespace flashspark::test
