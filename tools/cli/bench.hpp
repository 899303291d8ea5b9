// What bench and bench decode share: where they run, and what they have timed.
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

// The GPU if there is one, and what it or the CPU could do.
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
  std::string error;     // not empty: could not run
  std::string left_out;  // not empty: and that is no failure, in a few words
  std::string implementation;
  std::vector<double> seconds;  // of a call, sorted
  size_t calls = 1;             // of which each of them is the mean
  Work work;
  Roofline roof;
  double at(double quantile) const { return seconds[static_cast<size_t>(quantile * (seconds.size() - 1))]; }
  double median() const { return at(0.5); }
  bool failed() const { return !error.empty() && left_out.empty(); }
  // The library's last error; without an implementation asked for, a case that nothing there offers is no failure.
  void refuse(flashspark_status status, const BenchOptions &options);
  // Calls until so many seconds are spent, of which `call` returns those of the call with this number.
  void take(double most_seconds, const std::function<double(size_t)> &call);
};

std::vector<Timing> time_all(const std::vector<cases::Case> &all,
                             const std::function<Timing(const cases::Case &)> &measure);
Json report(const Target &target, const std::vector<Timing> &timings);
void add_untimed(Table &table, const Timing &timing);
void print_failures(const std::vector<Timing> &timings);
int exit_status(const std::vector<Timing> &timings);

}  // namespace flashspark::cli
