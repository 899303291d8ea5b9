#include "cli/machine.hpp"

#include <fmt/format.h>
#include <sched.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "flashspark/flashspark.h"

namespace flashspark::cli {
namespace {

// The value after the colon in the first line that starts with `key`.
std::string field(const std::string &text, const std::string &key, char separator) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with(key)) continue;
    const size_t at = line.find(separator);
    if (at == std::string::npos) continue;
    std::string value = line.substr(at + 1);
    std::erase(value, '"');
    return value.substr(std::min(value.find_first_not_of(" \t"), value.size()));
  }
  return {};
}

std::string cpu_model() {
  const std::string info = read_text("/proc/cpuinfo");
  if (std::string name = field(info, "model name", ':'); !name.empty()) return name;
  // Arm CPUs report no model name there: use the board's, or the numbers that identify the core.
  if (std::string board = read_text("/sys/firmware/devicetree/base/model"); !board.empty()) {
    std::erase(board, '\0');
    return board;
  }
  const std::string implementer = field(info, "CPU implementer", ':'), part = field(info, "CPU part", ':');
  return implementer.empty() ? "unknown" : fmt::format("Arm implementer {} part {}", implementer, part);
}

double cpu_quota() {
  std::istringstream text(read_text("/sys/fs/cgroup/cpu.max"));
  double quota = 0, period = 0;
  return text >> quota >> period && period > 0 ? quota / period : 0;  // "max 100000" means no quota
}

// All threads copy at once, each its own block, larger than its part of any cache. Returns the best of several runs.
double copy_bandwidth(int threads) {
  const size_t block = std::max<size_t>(size_t{128} << 20, static_cast<size_t>(threads) << 24) / threads;
  std::vector<std::unique_ptr<char[]>> from, to;
  for (int t = 0; t < threads; ++t) {
    from.push_back(std::make_unique<char[]>(block));
    to.push_back(std::make_unique<char[]>(block));
  }
  double best = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(400);
  for (int repeat = 0; repeat < 4 || std::chrono::steady_clock::now() < end; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    {
      std::vector<std::jthread> workers;
      for (int t = 0; t < threads; ++t) {
        workers.emplace_back([&, t] { std::memcpy(to[t].get(), from[t].get(), block); });
      }
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2.0 * static_cast<double>(block) * threads / seconds);
  }
  return best;
}

}  // namespace

std::string read_text(const std::string &path) {
  std::ifstream file(path);
  std::ostringstream text;
  if (file) text << file.rdbuf();
  std::string result = text.str();
  while (!result.empty() && result.back() == '\n') result.pop_back();
  return result;
}

void write_text(const std::string &path, const std::string &text) {
  std::ofstream file(path);
  file << text;
  file.close();
  if (!file) throw std::runtime_error(fmt::format("cannot write {}: {}", path, std::strerror(errno)));
}

void require_writable(const std::string &path) {
  if (!std::ofstream(path, std::ios::app))
    throw std::runtime_error(fmt::format("cannot write {}: {}", path, std::strerror(errno)));
}

Machine machine() {
  Machine m;
  m.cpu = cpu_model();
  utsname names{};
  uname(&names);
  m.arch = names.machine;
  m.kernel = names.release;
  const char *simd = flashspark_cpu_target();
  m.simd = simd != nullptr ? simd : "unknown";
  m.threads = flashspark_cpu_threads();
  cpu_set_t set;
  m.cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                        : static_cast<int>(std::thread::hardware_concurrency());
  m.cpu_limit = cpu_quota();
  struct sysinfo info{};
  if (sysinfo(&info) == 0) m.memory_gib = static_cast<double>(info.totalram) * info.mem_unit / (1 << 30);
  m.os = field(read_text("/etc/os-release"), "PRETTY_NAME", '=');
  m.version = flashspark_version();
#if defined(__clang__)
  m.compiler = "clang " __clang_version__;
#else
  m.compiler = "gcc " __VERSION__;
#endif
  return m;
}

size_t free_memory() {
  return std::strtoull(field(read_text("/proc/meminfo"), "MemAvailable", ':').c_str(), nullptr, 10) << 10;  // "123 kB"
}

Limits measure_limits(int threads) {
  if (threads <= 0) threads = flashspark_cpu_threads();
  return {measure_peak_flops(threads), copy_bandwidth(threads)};
}

}  // namespace flashspark::cli
