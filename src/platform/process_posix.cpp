#include <pthread.h>
#include <sched.h>
#include <sys/auxv.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "platform/process.hpp"

namespace flashspark {

void at_fork_in_child(void (*action)()) {
  pthread_atfork(nullptr, nullptr, action);
}

int cpus_of_process() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

std::optional<std::string> environment_variable(const char *name) {
  const char *value = std::getenv(name);
  return value != nullptr ? std::optional<std::string>(value) : std::nullopt;
}

// Also in a root without /proc.
std::string program_file() {
  std::error_code error;
  std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) {
    const auto *name = reinterpret_cast<const char *>(getauxval(AT_EXECFN));  // NOLINT: the kernel gives a number
    self = std::filesystem::canonical(name, error);
  }
  return self.string();
}

}  // namespace flashspark
