// Each feature of the problem description alone, as an edit of a plain problem; and the layouts they are crossed with.
#pragma once

#include <string>
#include <vector>

#include "support/model.hpp"

namespace flashspark::test {

struct Feature {
  const char *name;
  void (*dress)(Problem &, std::mt19937_64 &);   // before the numbers are drawn: dtypes, widths, masks of the problem
  void (*finish)(Problem &, std::mt19937_64 &);  // after: what hangs on the sequences
};

const std::vector<Feature> &features();
const std::vector<std::pair<const char *, Layout>> &layouts();

// Unequal sequences, among them a single query, no query, no key, and more queries than keys.
Problem problem_with(const Feature &feature, uint64_t seed);

}  // namespace flashspark::test
