// The subcommands. Each returns the exit status: 0 success, 1 a check failed. main.cpp reports usage errors (status 2).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace flashspark::cli {

constexpr int kOk = 0;
constexpr int kFailed = 1;
constexpr int kUsage = 2;

// Options that parse but are meaningless (no such case, no such implementation).
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DoctorOptions {
  bool json = false;
  bool verbose = false;    // print explanations in full
  bool bandwidth = false;  // measure copy bandwidth and peak FMA rate
};

struct VerifyOptions {
  bool json = false;
  bool cpu = false;  // not on the GPU
  bool list = false;
  bool verbose = false;  // print a line for every case
  bool vllm = false;     // verify the installed vLLM's backend instead
  std::string filter;
  std::string implementation;  // empty: all
  int threads = 0;
  uint64_t seed = 0;  // added to the seed of every case
  std::string report;
};

struct BenchOptions {
  bool json = false;
  bool cpu = false;  // not on the GPU
  bool list = false;
  bool matrix = false;    // also the feature matrix; only of bench itself
  bool backward = false;  // gradients instead of results; only of bench itself
  bool full = false;      // bench decode: the whole grid; bench flex: the GPU's shapes on the CPU, too
  std::string filter;
  std::string implementation;  // empty: chosen by dispatch
  int threads = 0;
  uint64_t seed = 0;
  double seconds = 0.5;  // per case
  std::string plot;
};

int doctor(const DoctorOptions &options);
int verify(const VerifyOptions &options);
int verify_vllm(const VerifyOptions &options);  // replaces the process if it can start Python
int bench(const BenchOptions &options);
int bench_decode(const BenchOptions &options);
int bench_flex(const BenchOptions &options);
int uninstall();

}  // namespace flashspark::cli
