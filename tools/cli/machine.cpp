#include "cli/machine.hpp"

#include <fmt/format.h>

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

#include "cli/system.hpp"
#include "flashspark/flashspark.h"
#include "platform/process.hpp"

namespace flashspark::cli {
namespace {

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
  const SystemFacts system = system_facts();
  m.cpu = system.cpu;
  m.arch = system.arch;
  m.kernel = system.kernel;
  m.os = system.os;
  m.memory_gib = system.memory_gib;
  m.cpu_limit = system.cpu_limit;
  const char *simd = flashspark_cpu_target();
  m.simd = simd != nullptr ? simd : "unknown";
  m.threads = flashspark_cpu_threads();
  m.cores = cpus_of_process();
  m.version = flashspark_version();
#if defined(__clang__)
  m.compiler = "clang " __clang_version__;
#else
  m.compiler = "gcc " __VERSION__;
#endif
  return m;
}

Limits measure_limits(int threads) {
  if (threads <= 0) threads = flashspark_cpu_threads();
  return {measure_peak_flops(threads), copy_bandwidth(threads)};
}

}  // namespace flashspark::cli
