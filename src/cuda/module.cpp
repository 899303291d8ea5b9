#include "cuda/module.hpp"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "cuda/fatbins.hpp"
#include "error.hpp"

namespace flashspark::cuda {
namespace {

// A loaded fatbin. `ready` has a bit for each device on which the kernel may be launched; it is set last, so whoever
// sees the bit sees the kernel.
struct Slot {
  Kernel kernel = nullptr;
  std::atomic<uint64_t> ready{0};
};
// By key: its instance and dtype may be none.
constexpr size_t kMostInstances = std::max(std::size(kInstances), std::size(kBackwardInstances));
Slot slots[std::size(operations::kTable)][kMostInstances + 1][kNumKernelDTypes];
std::mutex loading;

// Loading allocates, which a captured stream's thread may do only after it has said that it means it.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture &) = delete;
  RelaxedCapture &operator=(const RelaxedCapture &) = delete;

 private:
  int mode_ = kCaptureRelaxed;
};

// A driver that is older than the compiler may not read what that made, and only says that the image is invalid.
void require_load(Result result, const char *function) {
  const Driver &d = driver();
  if (result == kSuccess || result == kOutOfMemory || d.version >= kCertainlyLoadingVersion)
    return require(result, function);
  throw Error(FLASHSPARK_DEVICE_ERROR, "the NVIDIA driver offers " + version_text(d.version) +
                                           " and does not load the kernels (" + error_text(d, function, result) + ")" +
                                           kUpdateDriver);
}
#define FLASHSPARK_LOAD(function, ...) require_load(driver().function(__VA_ARGS__), #function)

Kernel load_from(const void *image, const std::string &entry) {
  Library library = nullptr;
  Kernel kernel = nullptr;
  FLASHSPARK_LOAD(cuLibraryLoadData, &library, image, nullptr, nullptr, 0, nullptr, nullptr, 0);
  FLASHSPARK_LOAD(cuLibraryGetKernel, &kernel, library, entry.c_str());
  return kernel;
}

Kernel load(const std::string &name) {
  for (const Fatbin &fatbin : fatbins()) {
    if (name == fatbin.name) return load_from(fatbin.begin, "flashspark_" + name);
  }
  throw Error(FLASHSPARK_INTERNAL, "the kernel " + name + " is not in this library");
}

// The driver loads lazily, at the first launch; here is a better place, since launches may be captured.
void load_now(Kernel kernel) {
  Function unused = nullptr;
  FLASHSPARK_LOAD(cuKernelGetFunction, &unused, kernel);
}

void allow_shared_memory(Kernel kernel, int index, uint32_t shared_bytes) {
  constexpr uint32_t kAlwaysAllowed = 48 << 10;
  if (shared_bytes <= kAlwaysAllowed) return;
  Device device = 0;
  FLASHSPARK_CUDA_CALL(driver(), cuDeviceGet, &device, index);
  FLASHSPARK_CUDA_CALL(driver(), cuKernelSetAttribute, kMaxDynamicSharedBytes, static_cast<int>(shared_bytes), kernel,
                       device);
}

Slot &slot_of(const KernelKey &key) {
  return slots[static_cast<int32_t>(key.operation)][key.instance_number()][static_cast<int32_t>(key.dtype)];
}

}  // namespace

Kernel get(const KernelKey &key, int index, uint32_t shared_bytes) {
  Slot &slot = slot_of(key);
  const uint64_t bit = uint64_t{1} << index;
  if (slot.ready.load(std::memory_order_acquire) & bit) return slot.kernel;
  const std::lock_guard lock(loading);
  if (slot.ready.load(std::memory_order_relaxed) & bit) return slot.kernel;
  const RelaxedCapture relaxed;
  if (slot.kernel == nullptr) slot.kernel = load(key.name());
  allow_shared_memory(slot.kernel, index, shared_bytes);
  load_now(slot.kernel);
  slot.ready.fetch_or(bit, std::memory_order_release);
  return slot.kernel;
}

Kernel load_kernel(const void *image, const std::string &entry, int index, uint32_t shared_bytes) {
  const RelaxedCapture relaxed;
  const Kernel kernel = load_from(image, entry);
  allow_shared_memory(kernel, index, shared_bytes);
  load_now(kernel);
  return kernel;
}

}  // namespace flashspark::cuda
