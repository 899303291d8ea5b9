#include "cuda/driver.hpp"

#include <atomic>
#include <cstdlib>
#include <type_traits>

#include "error.hpp"
#include "platform/dynamic_library.hpp"
#include "platform/process.hpp"

namespace flashspark::cuda {
namespace {

std::atomic<bool> forked{false};

template <class F>
bool take(Result (*get_address)(const char *, void **, int, uint64_t, int *), const char *name, F &function) {
  void *address = nullptr;
  constexpr uint64_t kDefaultFlags = 0;
  if (get_address(name, &address, kDriverVersion, kDefaultFlags, nullptr) != kSuccess || address == nullptr)
    return false;
  function = reinterpret_cast<F>(address);
  return true;
}

// Why cuInit fails and what mends it, where that is known, as an addition to the driver's own words.
const char *remedy_of(Result result) {
  switch (result) {
    case kNotInitialized:  // in a forked child whose parent has used the driver, for instance through torch
      return ": was CUDA initialised before fork()? Then start processes by spawn";
    case kStubLibrary:
      return ": libcuda.so.1 is the toolkit's stub, for linking only; take its folder off LD_LIBRARY_PATH";
    case kDeviceUnavailable:
      return ": another process has the GPU to itself (nvidia-smi shows its compute mode)";
    case kSystemNotReady:
      return ": the GPUs are not ready yet; is nvidia-fabricmanager running?";
    case kDriverMismatch:
      return ": libcuda.so.1 and the kernel module are of different versions; reboot after an update, and in a "
             "container "
             "leave libcuda.so.1 to the NVIDIA container toolkit";
    case kCompatNotSupported:
      return ": the container's CUDA is newer than the driver, which only data-centre GPUs bridge; update the host's "
             "driver";
    default:
      return "";
  }
}

void load(Driver &d) {
  const DynamicLibrary library = DynamicLibrary::open_system(kDriverFile);
  if (!library) {
    d.unavailable_reason = std::string("no NVIDIA driver: ") + kDriverFile + " is not found";
    return;
  }
  d.found = true;
  using GetAddress = Result (*)(const char *, void **, int, uint64_t, int *);
  const auto get_address = reinterpret_cast<GetAddress>(library.symbol("cuGetProcAddress_v2"));
  if (get_address == nullptr) {
    d.unavailable_reason = std::string("the NVIDIA driver is older than CUDA 12.0") + kUpdateDriver;
    return;
  }
#define FLASHSPARK_DRIVER_TAKE(name, ...)                                                  \
  if (!take(get_address, #name, d.name)) {                                                 \
    d.unavailable_reason = std::string("the NVIDIA driver has no " #name) + kUpdateDriver; \
    return;                                                                                \
  }
  FLASHSPARK_DRIVER_FUNCTIONS(FLASHSPARK_DRIVER_TAKE)
#undef FLASHSPARK_DRIVER_TAKE
  d.cuDriverGetVersion(&d.version);
  Result result = d.init_result = d.cuInit(0);
  if (result == kNoDevice) {
    d.unavailable_reason = "no GPU: the NVIDIA driver finds none" + visible_devices_text();
    return;
  }
  if (result == kSuccess) result = d.cuDeviceGetCount(&d.device_count);
  if (result == kSuccess) {
    at_fork_in_child([] { forked.store(true, std::memory_order_relaxed); });
    return;
  }
  d.unavailable_reason = error_text(d, "cuInit", result) + remedy_of(result);
}

}  // namespace

const Driver &driver() {
  static const Driver instance = [] {
    Driver d;
    load(d);
    return d;
  }();
  if (forked.load(std::memory_order_relaxed)) {
    throw Error(FLASHSPARK_DEVICE_ERROR,
                "CUDA was initialised before fork(), and the driver does not work in the child: start processes by "
                "spawn, or fork before the first CUDA call");
  }
  return instance;
}

std::string version_text(int version) {
  return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string visible_devices_text() {
  const char *value = std::getenv("CUDA_VISIBLE_DEVICES");
  if (value == nullptr) return {};
  return std::string(" with CUDA_VISIBLE_DEVICES=") + (*value != '\0' ? value : "\"\"");
}

std::string error_text(const Driver &d, const char *function, Result result) {
  const char *name = nullptr;
  if (d.cuGetErrorName == nullptr || d.cuGetErrorName(result, &name) != kSuccess || name == nullptr)
    name = "unknown error";
  return std::string(function) + ": " + name + " (" + std::to_string(result) + ")";
}

void require(Result result, const char *function) {
  if (result == kSuccess) return;
  throw Error(result == kOutOfMemory ? FLASHSPARK_OUT_OF_MEMORY : FLASHSPARK_DEVICE_ERROR,
              error_text(driver(), function, result));
}

}  // namespace flashspark::cuda
