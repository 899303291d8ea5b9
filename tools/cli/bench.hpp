// Shared by bench, bench decode and bench flex: the device to measure on and the timings.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cli/cli.hpp"
#include "cli/gpu_run.hpp"
#include "cli/json.hpp"
#include "cli/measure.hpp"
#include "cli/terminal.hpp"

namespace flashspark::cli {

// The device to measure on: the GPU if there is one, else the CPU, with its facts and limits.
struct Target {
  explicit Target(const BenchOptions &options);  // throws UsageError if the implementation cannot run here
  std::string text() const;

  std::unique_ptr<GpuSession> gpu;  // NULL: the CPU
  Machine facts;
  int threads;
  Limits limits;
};

struct Timing {
  const cases::Case *spec = nullptr;
  std::string error;     // not empty if the case could not run
  std::string left_out;  // not empty if the case was skipped, which is no failure
  std::string implementation;
  std::vector<double> seconds;  // per call, sorted
  size_t calls = 1;             // calls averaged into each entry of `seconds`
  Work work;
  Roofline roof;
  double at(double quantile) const { return seconds[static_cast<size_t>(quantile * (seconds.size() - 1))]; }
  double median() const { return at(0.5); }
  bool failed() const { return !error.empty() && left_out.empty(); }
  // Records the library's last error. A case that no implementation supports is no failure unless one was asked for by
  // name.
  void refuse(flashspark_status status, const BenchOptions &options);
  // Repeats `call`, which gets the call's number and returns its seconds, until the time budget is spent.
  void take(double most_seconds, const std::function<double(size_t)> &call);
};

std::vector<Timing> time_all(const std::vector<cases::Case> &all,
                             const std::function<Timing(const cases::Case &)> &measure);
Json report(const Target &target, const std::vector<Timing> &timings);
void add_untimed(Table &table, const Timing &timing);
void print_failures(const std::vector<Timing> &timings);
int exit_status(const std::vector<Timing> &timings);
// A bar for each case: its share of the machine's limit.
void plot_limit_shares(const std::vector<Timing> &timings, const Target &target, const BenchOptions &options);

}  // namespace flashspark::cli
