#include "cuda/device.hpp"

#include <array>
#include <mutex>
#include <string_view>

#include "cuda/fatbins.hpp"
#include "error.hpp"

namespace flashspark::cuda {
namespace {

constexpr int kMostDevices = 64;

std::string name_of(int index) {
  return "CUDA device " + std::to_string(index);
}

bool is_built(std::string_view arch) {
  const std::string_view all = fatbin_architectures();
  const size_t at = all.find(arch);
  return at != all.npos && (at + arch.size() == all.size() || all[at + arch.size()] == ',');
}

DeviceFacts ask(int index) {
  const Driver &d = driver();
  DeviceFacts facts;
  Device device = 0;
  FLASHSPARK_CUDA_CALL(d, cuDeviceGet, &device, index);
  const auto attribute = [&](int which) {
    int value = 0;
    FLASHSPARK_CUDA_CALL(d, cuDeviceGetAttribute, &value, which, device);
    return value;
  };
  char name[256] = "";
  FLASHSPARK_CUDA_CALL(d, cuDeviceGetName, name, sizeof name, device);
  facts.name = name;
  facts.major = attribute(kMajor);
  facts.minor = attribute(kMinor);
  facts.shared_bytes_per_block = attribute(kSharedBytesPerBlock);
  facts.machine.sm_count = attribute(kSmCount);
  facts.machine.l2_bytes = attribute(kL2Bytes);
  facts.machine.shared_bytes_per_sm = attribute(kSharedBytesPerSm);
  const std::string capability = std::to_string(facts.major) + "." + std::to_string(facts.minor);
  if (!architecture_of(facts.major, facts.minor, facts.machine.arch)) {
    facts.unavailable_reason =
        facts.name + " has compute capability " + capability + "; the kernels serve 8.x, 9.0 and 12.x";
  } else if (!is_built(architecture_name(facts.machine.arch))) {
    facts.unavailable_reason = facts.name + " needs " + architecture_name(facts.machine.arch) +
                               " kernels; this build has " + fatbin_architectures();
  }
  return facts;
}

// The primary context, never released: it outlives every call that could still use it.
Context primary_context(int index) {
  static std::array<std::once_flag, kMostDevices> once;
  static std::array<Context, kMostDevices> contexts{};
  std::call_once(once[index], [&] {
    Device device = 0;
    FLASHSPARK_CUDA_CALL(driver(), cuDeviceGet, &device, index);
    FLASHSPARK_CUDA_CALL(driver(), cuDevicePrimaryCtxRetain, &contexts[index], device);
  });
  return contexts[index];
}

}  // namespace

bool architecture_of(int major, int minor, Architecture &arch) {
  if (major == 8) return arch = Architecture::sm_80, true;
  if (major == 9 && minor == 0) return arch = Architecture::sm_90, true;
  if (major == 12) return arch = Architecture::sm_120f, true;
  return false;
}

const char *architecture_name(Architecture arch) {
  return arch == Architecture::sm_80 ? "sm_80" : arch == Architecture::sm_90 ? "sm_90" : "sm_120f";
}

const DeviceFacts &device_facts(int index) {
  static std::array<std::once_flag, kMostDevices> once;
  static std::array<DeviceFacts, kMostDevices> facts;
  std::call_once(once[index], [&] { facts[index] = ask(index); });
  return facts[index];
}

std::string device_unavailable_reason(int index) {
  if (fatbins().empty()) return why_no_fatbins();
  const Driver &d = driver();
  if (!d.unavailable_reason.empty()) return d.unavailable_reason;
  if (d.version < kOldestLoadingVersion)
    return "the NVIDIA driver offers " + version_text(d.version) + ", too old to load the kernels" + kUpdateDriver;
  if (index >= d.device_count)
    return "there is no " + name_of(index) + ": the driver has " + std::to_string(d.device_count) +
           visible_devices_text();
  if (index >= kMostDevices) return name_of(index) + " is beyond the first " + std::to_string(kMostDevices);
  return device_facts(index).unavailable_reason;
}

CurrentDevice::CurrentDevice(int index) {
  const Driver &d = driver();
  Context context = nullptr;
  Device device = -1;
  // A device's handle is its ordinal.
  if (d.cuCtxGetCurrent(&context) == kSuccess && context != nullptr && d.cuCtxGetDevice(&device) == kSuccess &&
      device == index)
    return;
  FLASHSPARK_CUDA_CALL(d, cuCtxPushCurrent, primary_context(index));
  pushed_ = true;
}

CurrentDevice::~CurrentDevice() {
  Context context = nullptr;
  if (pushed_) driver().cuCtxPopCurrent(&context);
}

}  // namespace flashspark::cuda
