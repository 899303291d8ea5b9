// A libcuda.so.1 without a GPU: it keeps the driver's rules (contexts, attributes, captures) and writes down what it is
// asked for. The test links it, so that the library's dlopen() finds it loaded.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "append/arguments.hpp"
#include "cuda/driver.hpp"
#include "forward/arguments.hpp"

namespace fake_cuda {

struct Device {
  std::string name = "NVIDIA Imagined";
  int major = 12, minor = 0;
  int sm_count = 48;
};

struct Launch {
  const void *image = nullptr;  // the fatbin
  std::string function;
  int device = -1;
  unsigned grid[3] = {}, threads = 0, shared_bytes = 0;
  void *stream = nullptr;
  flashspark::ForwardArguments arguments{};
  flashspark::AppendArguments append{};  // of flashspark_append_kv
  bool early = false;                    // programmatic dependent launch
};

struct State {
  std::mutex mutex;
  // What the driver is like; the devices must be set before the first call that needs one.
  std::vector<Device> devices{{}, {}, {"NVIDIA Old", 7, 5}, {"NVIDIA Datacenter", 10, 0}, {"NVIDIA Hopper", 9, 0}};
  int init_result = 0, launch_result = 0, allocate_result = 0;
  bool capturing = false;
  // What was asked of it.
  std::vector<Launch> launches;
  std::vector<std::string> order;  // of launches, allocations and frees: "alloc 4096", "flashspark_append_kv", "free"
  std::vector<const void *> loads;
  int pushes = 0, pops = 0;
};

State &state();
int current_device();            // of this thread; -1: no context
void set_current_device(int n);  // -1: none
std::string function_of(flashspark::cuda::Kernel kernel);

}  // namespace fake_cuda
