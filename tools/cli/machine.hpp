// Facts about the machine, for doctor and for the reports.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace flashspark::cli {

struct Machine {
  std::string cpu;       // "AMD EPYC 7763"
  std::string arch;      // "x86_64"
  std::string simd;      // flashspark_cpu_target()
  int cores = 0;         // logical CPUs this process may run on
  double cpu_limit = 0;  // CPUs that the container's quota allows; 0: no quota
  int threads = 0;       // threads that flashspark uses
  double memory_gib = 0;
  std::string os;        // "Debian GNU/Linux 12 (bookworm)"
  std::string kernel;    // "6.1.0"
  std::string version;   // of flashspark
  std::string compiler;  // that built it
};
Machine machine();

// What the hardware can reach, measured on the spot with `threads` threads.
struct Limits {
  double flops = 0;  // float32 multiply-adds in registers, 2 FLOP each, per second
  double bytes = 0;  // copy of a block larger than the caches, bytes read + written per second
};
Limits measure_limits(int threads);
double measure_peak_flops(int threads);  // peak.cpp

struct Gpu {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  double memory_gib = 0;
};
struct GpuFacts {
  std::vector<Gpu> gpus;
  std::string driver;         // "580.95.05"; empty if there is no kernel module
  int cuda_version = 0;       // the newest that the driver supports: 13000; 0 without libcuda
  bool driver_found = false;  // libcuda.so.1 is present
  bool none = false;          // it finds no GPU
  std::string error;          // why there are no GPUs
  std::string toolkit;        // folder of the CUDA toolkit; empty if none
  std::string toolkit_version;
};
GpuFacts gpu_facts();

std::string read_text(const std::string &path);                     // empty if it cannot be read
void write_text(const std::string &path, const std::string &text);  // throws if it could not all be written
void require_writable(const std::string &path);  // throws if it is not writable; called before minutes of work

}  // namespace flashspark::cli
