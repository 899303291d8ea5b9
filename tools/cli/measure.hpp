// What verify and bench share: choosing cases and implementations, timing, the roofline.
#pragma once

#include <string>
#include <vector>

#include "cases/cases.hpp"
#include "cli/machine.hpp"

namespace flashspark::cli {

// Cases whose name contains `filter`; throws UsageError if there is none.
std::vector<cases::Case> select(std::vector<cases::Case> all, const std::string &filter, uint64_t seed);

// Names of this build's implementations that can run here, or the one asked for; throws UsageError for an unknown name,
// and for the GPU's without a GPU.
std::vector<std::string> select_implementations(const std::string &name, bool gpu);

// What is wrong with the library's environment switches, which it reports when it computes; empty if nothing.
std::string environment_error();

void print_list(const std::vector<cases::Case> &all, bool json);

// Seconds of one call, of which `status` is the result.
double time_call(cases::Problem &problem, const char *implementation, int threads, flashspark_status &status);

// What one call costs at least on this machine: the larger of its arithmetic and its memory traffic.
struct Work {
  double flops = 0;
  double bytes = 0;
};
Work work(const cases::Problem &problem);
struct Roofline {
  double seconds = 0;  // 0: nothing to do
  bool memory_bound = false;
};
Roofline roofline(const Work &work, const Limits &limits);

}  // namespace flashspark::cli
