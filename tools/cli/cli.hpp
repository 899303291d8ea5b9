// The subcommands. Each returns the process's exit status: 0 fine, 1 a check failed. Usage errors (2) end in main.cpp.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace flashspark::cli {

constexpr int kOk = 0;
constexpr int kFailed = 1;
constexpr int kUsage = 2;

// Options that parse but make no sense (no such case, no such implementation).
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DoctorOptions {
  bool json = false;
  bool verbose = false;    // the whole of every explanation
  bool bandwidth = false;  // measure copy bandwidth and FMA peak
};

struct VerifyOptions {
  bool json = false;
  bool cpu = false;  // not on the GPU
  bool list = false;
  bool verbose = false;  // a line for every case
  bool vllm = false;     // the installed vLLM's backend instead
  std::string filter;
  std::string implementation;  // empty: every one
  int threads = 0;
  uint64_t seed = 0;  // added to every case's own
  std::string report;
};

struct BenchOptions {
  bool json = false;
  bool cpu = false;  // not on the GPU
  bool list = false;
  bool matrix = false;  // the feature matrix too; not of bench decode
  bool full = false;    // of bench decode: its whole grid
  std::string filter;
  std::string implementation;  // empty: what dispatch chooses
  int threads = 0;
  uint64_t seed = 0;
  double seconds = 0.5;  // per case
  std::string plot;
};

int doctor(const DoctorOptions &options);
int verify(const VerifyOptions &options);
int verify_vllm(const VerifyOptions &options);  // does not return if Python runs
int bench(const BenchOptions &options);
int bench_decode(const BenchOptions &options);
int uninstall();

}  // namespace flashspark::cli
