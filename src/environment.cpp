#include "environment.hpp"

#include <charconv>
#include <cstdlib>
#include <cstring>

#include "cpu/tile.hpp"
#include "cuda/compile_environment.hpp"
#include "dispatch.hpp"
#include "error.hpp"

namespace flashspark {
namespace {

constexpr int32_t kMaxThreads = 1024;

bool is_set(const char *value) {
  return value != nullptr && *value != '\0';
}

}  // namespace

Environment read_environment(const Switches &switches) {
  const auto &[force_implementation, cpu_target, num_threads, check] = switches;
  Environment e;
  const auto wrong = [&](const char *name, const char *value, const std::string &rule) {
    if (e.error.empty()) e.error = std::string(name) + " = " + value + ": must be " + rule;
  };
  if (is_set(force_implementation)) {
    for (const Implementation &each : implementations()) {
      if (std::strcmp(each.name, force_implementation) == 0) e.force_implementation = force_implementation;
    }
    if (e.force_implementation.empty())
      wrong("FLASHSPARK_FORCE_IMPLEMENTATION", force_implementation, "one of " + implementation_names());
  }
  if (is_set(cpu_target)) {
    std::string known;
    for (const cpu::Kernels *kernels : cpu::all_kernels()) {
      if (std::strcmp(kernels->target, cpu_target) == 0) e.cpu_target = cpu_target;
      known += (known.empty() ? "" : ", ") + std::string(kernels->target);
    }
    if (e.cpu_target.empty()) wrong("FLASHSPARK_CPU_TARGET", cpu_target, "a target that this CPU runs: " + known);
  }
  if (is_set(num_threads)) {
    const char *end = num_threads + std::strlen(num_threads);
    int32_t value = 0;
    const auto [stop, failure] = std::from_chars(num_threads, end, value);
    if (failure == std::errc() && stop == end && value >= 0 && value <= kMaxThreads) {
      e.num_threads = value;
    } else {
      wrong("FLASHSPARK_NUM_THREADS", num_threads, "a number from 0 (all CPUs) to " + std::to_string(kMaxThreads));
    }
  }
  if (is_set(check)) {
    e.check = std::strcmp(check, "1") == 0;
    if (!e.check && std::strcmp(check, "0") != 0) wrong("FLASHSPARK_CHECK", check, "0 or 1");
  }
  return e;
}

const Environment &environment() {
  static const Environment read = [] {
    Environment e = read_environment({.force_implementation = std::getenv("FLASHSPARK_FORCE_IMPLEMENTATION"),
                                      .cpu_target = std::getenv("FLASHSPARK_CPU_TARGET"),
                                      .num_threads = std::getenv("FLASHSPARK_NUM_THREADS"),
                                      .check = std::getenv("FLASHSPARK_CHECK")});
    if (e.error.empty()) e.error = cuda::compile_environment().error;
    return e;
  }();
  return read;
}

void check_environment() {
  const Environment &e = environment();
  if (!e.error.empty()) throw Error(FLASHSPARK_INVALID_ARGUMENT, e.error);
}

}  // namespace flashspark
