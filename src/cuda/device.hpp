// Facts about a GPU, and the context in which a call runs on it.
#pragma once

#include <string>

#include "cuda/driver.hpp"
#include "cuda/plan.hpp"

namespace flashspark::cuda {

struct DeviceFacts {
  std::string name;  // "NVIDIA GeForce RTX 5090"
  int major = 0, minor = 0;
  int64_t shared_bytes_per_block = 0;
  Machine machine{};
  std::string unavailable_reason;  // why the kernels of this build do not run there, in words; empty: they do
};

// The driver is asked once. `index` must be a device of the driver.
const DeviceFacts &device_facts(int index);

// The kernels that run on compute capability major.minor: a cubin also runs on later minors of its major. False: none.
bool architecture_of(int major, int minor, Architecture &arch);
const char *architecture_name(Architecture arch);  // "sm_120f"

// Why CUDA device `index` cannot be used, in words; empty: it can. Loads the driver.
std::string device_unavailable_reason(int index);

// While this lives, a context of the device is current: the caller's, if it has one of this device current, or the
// device's primary context, which CUDA's runtime and torch use too.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice &) = delete;
  CurrentDevice &operator=(const CurrentDevice &) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace flashspark::cuda
