#include "cli/measure.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "cli/cli.hpp"
#include "cli/gpu_run.hpp"
#include "cli/json.hpp"
#include "dispatch.hpp"

namespace flashspark::cli {

std::vector<cases::Case> select(std::vector<cases::Case> all, const std::string &filter, uint64_t seed) {
  std::erase_if(all, [&](const cases::Case &c) { return c.name.find(filter) == std::string::npos; });
  if (all.empty())
    throw UsageError(fmt::format("--filter: no case has \"{}\" in its name; --list shows the names", filter));
  for (cases::Case &c : all) c.seed += seed;
  return all;
}

std::vector<std::string> select_implementations(const std::string &name, bool gpu) {
  if (name == kGpuImplementation && !gpu) {
    const std::string reason = gpu_unavailable_reason();
    throw UsageError(fmt::format("--implementation: {} cannot run here: {}", name, reason.empty() ? "--cpu" : reason));
  }
  std::vector<std::string> names;
  for (int n = 0; const char *each = flashspark_implementation_name(n); ++n) names.push_back(each);
  if (name.empty()) {
    if (!gpu) std::erase(names, kGpuImplementation);
    return names;
  }
  if (std::find(names.begin(), names.end(), name) != names.end()) return {name};
  throw UsageError(
      fmt::format("--implementation: \"{}\" is not in this build; there are {}", name, fmt::join(names, ", ")));
}

std::string chosen(const flashspark_attention_params &p) {
  return choose(p).name;
}
std::string chosen(const flashspark_attention_backward_params &p) {
  return choose_backward(p).name;
}

std::string environment_error() {
  cases::Case smallest;
  smallest.lens = {{1, 1}};
  smallest.heads_q = smallest.heads_kv = 1, smallest.head_dim = 8;
  for (const char *implementation : {static_cast<const char *>(nullptr), "cpu-engine"}) {
    const flashspark_status status = cases::Problem(smallest).launch(implementation, 0);
    // Not an error of the environment variable: it names an implementation that does not run on a CPU.
    if (status != FLASHSPARK_OK && status != FLASHSPARK_UNSUPPORTED) return flashspark_last_error();
  }
  return {};
}

void print_list(const std::vector<cases::Case> &all, bool json) {
  if (json) {
    Json list = Json::array();
    for (const cases::Case &c : all) list.push_back(to_json(c));
    return print_json(list);
  }
  for (const cases::Case &c : all) fmt::print("{}\n", c.name);
}

namespace {

template <class Problem>
double time_launch(Problem &problem, const char *implementation, int threads, flashspark_status &status) {
  const auto start = std::chrono::steady_clock::now();
  status = problem.launch(implementation, threads);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double time_call(cases::Problem &problem, const char *implementation, int threads, flashspark_status &status) {
  return time_launch(problem, implementation, threads, status);
}
double time_call(cases::BackwardProblem &problem, const char *implementation, int threads, flashspark_status &status) {
  return time_launch(problem, implementation, threads, status);
}

Roofline roofline(const Work &work, const Limits &limits) {
  const double arithmetic = work.flops / limits.flops, traffic = work.bytes / limits.bytes;
  return {std::max(arithmetic, traffic), traffic > arithmetic};
}

}  // namespace flashspark::cli
