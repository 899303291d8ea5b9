#include "environment.hpp"

#include <charconv>
#include <cstdlib>
#include <cstring>

#include "cpu/tile.hpp"
#include "error.hpp"

namespace flashspark {
namespace {

constexpr int32_t kMostThreads = 1024;

bool is_set(const char *value) {
  return value != nullptr && *value != '\0';
}

}  // namespace

Environment read_environment(const char *cpu_target, const char *num_threads, const char *check) {
  Environment e;
  const auto wrong = [&](const char *name, const char *value, const std::string &rule) {
    if (e.error.empty()) e.error = std::string(name) + " = " + value + ": must be " + rule;
  };
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
    if (failure == std::errc() && stop == end && value >= 0 && value <= kMostThreads) {
      e.num_threads = value;
    } else {
      wrong("FLASHSPARK_NUM_THREADS", num_threads, "a number from 0 (all CPUs) to " + std::to_string(kMostThreads));
    }
  }
  if (is_set(check)) {
    e.check = std::strcmp(check, "1") == 0;
    if (!e.check && std::strcmp(check, "0") != 0) wrong("FLASHSPARK_CHECK", check, "0 or 1");
  }
  return e;
}

const Environment &environment() {
  static const Environment read = read_environment(
      std::getenv("FLASHSPARK_CPU_TARGET"), std::getenv("FLASHSPARK_NUM_THREADS"), std::getenv("FLASHSPARK_CHECK"));
  return read;
}

void check_environment() {
  const Environment &e = environment();
  if (!e.error.empty()) throw Error(FLASHSPARK_INVALID_ARGUMENT, e.error);
}

}  // namespace flashspark
