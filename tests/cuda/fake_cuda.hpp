// A libcuda.so.1 without a GPU. It enforces the driver's rules (contexts, attributes, captures) and records what it is
// asked to do. The test links it, so that the library's dlopen() finds it already loaded. Programs that find it on
// LD_LIBRARY_PATH say by environment variables how it behaves: FAKE_CUDA_INIT and FAKE_CUDA_LOAD, results;
// FAKE_CUDA_VERSION; FAKE_CUDA_DEVICE, the name of the only device, and FAKE_CUDA_SMS, how many SMs it has.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "append/arguments.hpp"
#include "attention/block_tiles.hpp"
#include "backward/function_arguments.hpp"
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
  flashspark::ForwardArguments arguments{};  // or the part of them that the kernel takes
  flashspark::AppendArguments append{};      // of flashspark_append_kv
  flashspark::BlockTileArguments block_tiles{};
  flashspark::BackwardArguments backward{};  // of the kernels of attention_backward
  bool early = false;                        // programmatic dependent launch
  flashspark::ClearArguments clear{};
  flashspark::RoundArguments round{};
  flashspark::BlockStatusArguments blocks{};
  flashspark::FunctionBackwardArguments backward_functions{};
};

struct State {
  std::mutex mutex;
  // How the driver behaves. Set the devices before the first call that needs one.
  std::vector<Device> devices{{}, {}, {"NVIDIA Old", 7, 5}, {"NVIDIA Datacenter", 10, 0}, {"NVIDIA Hopper", 9, 0}};
  int version = 13000;
  int init_result = 0, load_result = 0, launch_result = 0, allocate_result = 0;
  bool capturing = false;
  // What the driver was asked to do.
  std::vector<Launch> launches;
  std::vector<std::string>
      order;  // launches, allocations, frees and zeros: "alloc 4096", "zero 64", "flashspark_append_kv", "free"
  std::vector<const void *> loads;
  int pushes = 0, pops = 0;
};

State &state();
int current_device();            // of this thread; -1 if it has no context
void set_current_device(int n);  // -1 clears it
std::string function_of(flashspark::cuda::Kernel kernel);

}  // namespace fake_cuda
