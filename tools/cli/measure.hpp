// Shared by verify and bench: selecting cases and implementations, timing, the roofline.
#pragma once

#include <string>
#include <vector>

#include "cases/backward.hpp"
#include "cli/machine.hpp"

namespace flashspark::cli {

// Cases whose name contains `filter`; throws UsageError if there is none.
std::vector<cases::Case> select(std::vector<cases::Case> all, const std::string &filter, uint64_t seed);

// The implementations of this build that can run here, or the one asked for. Throws UsageError if it is unknown or
// needs a GPU that is not available.
std::vector<std::string> select_implementations(const std::string &name, bool gpu);

// The implementation that dispatch chooses. Throws Error if there is none.
std::string chosen(const flashspark_attention_params &p);
std::string chosen(const flashspark_attention_backward_params &p);

// Problems with the library's environment variables, which the library reports only when it computes; empty if none.
std::string environment_error();

void print_list(const std::vector<cases::Case> &all, bool json);

// Seconds of one call, whose result is stored in `status`.
double time_call(cases::Problem &problem, const char *implementation, int threads, flashspark_status &status);
double time_call(cases::BackwardProblem &problem, const char *implementation, int threads, flashspark_status &status);

// The least time that a call can take on this machine: the larger of its arithmetic and its memory traffic.
struct Work {
  double flops = 0;
  double bytes = 0;
};
template <class Problem>
Work work(const Problem &problem) {
  return {problem.flops(), problem.bytes()};
}
struct Roofline {
  double seconds = 0;  // 0: no work
  bool memory_bound = false;
};
Roofline roofline(const Work &work, const Limits &limits);

}  // namespace flashspark::cli
