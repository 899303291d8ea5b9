#include "cuda/module.hpp"

#include <atomic>
#include <cstring>
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
constexpr size_t kNumInstances = std::size(kInstances);
constexpr const char *kSuffix[] = {"_bf16", "_fp16", "_e4m3"};  // by KernelDType
Slot slots[kNumInstances + 1][std::size(kSuffix)];              // the last row is the combine kernel's
Slot schedule_slot, quantize_slot, append_slot;
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

Kernel load(const std::string &name) {
  for (const Fatbin &fatbin : fatbins()) {
    if (name != fatbin.name) continue;
    const Driver &d = driver();
    Library library = nullptr;
    Kernel kernel = nullptr;
    FLASHSPARK_CUDA_CALL(d, cuLibraryLoadData, &library, fatbin.begin, nullptr, nullptr, 0, nullptr, nullptr, 0);
    FLASHSPARK_CUDA_CALL(d, cuLibraryGetKernel, &kernel, library, ("flashspark_" + name).c_str());
    return kernel;
  }
  throw Error(FLASHSPARK_INTERNAL, "the kernel " + name + " is not in this library");
}

// The driver loads lazily, at the first launch; here is a better place, since launches may be captured.
void load_now(Kernel kernel) {
  Function unused = nullptr;
  FLASHSPARK_CUDA_CALL(driver(), cuKernelGetFunction, &unused, kernel);
}

Kernel kernel_of(Slot &slot, const std::string &name, int index, uint32_t shared_bytes) {
  const uint64_t bit = uint64_t{1} << index;
  if (slot.ready.load(std::memory_order_acquire) & bit) return slot.kernel;
  const std::lock_guard lock(loading);
  if (slot.ready.load(std::memory_order_relaxed) & bit) return slot.kernel;
  const RelaxedCapture relaxed;
  if (slot.kernel == nullptr) slot.kernel = load(name);
  constexpr uint32_t kAlwaysAllowed = 48 << 10;
  if (shared_bytes > kAlwaysAllowed) {
    Device device = 0;
    FLASHSPARK_CUDA_CALL(driver(), cuDeviceGet, &device, index);
    FLASHSPARK_CUDA_CALL(driver(), cuKernelSetAttribute, kMaxDynamicSharedBytes, static_cast<int>(shared_bytes),
                         slot.kernel, device);
  }
  load_now(slot.kernel);
  slot.ready.fetch_or(bit, std::memory_order_release);
  return slot.kernel;
}

}  // namespace

Kernel forward_kernel(const Instance &instance, KernelDType dtype, int index, uint32_t shared_bytes) {
  // By name: the instance may come from another translation unit's copy of the table.
  size_t place = 0;
  while (std::strcmp(kInstances[place].name, instance.name) != 0) ++place;
  const auto n = static_cast<size_t>(dtype);
  return kernel_of(slots[place][n], "attention_forward_" + (instance.name + std::string(kSuffix[n])), index,
                   shared_bytes);
}

Kernel combine_kernel(KernelDType dtype, int index) {
  const auto n = static_cast<size_t>(dtype);
  return kernel_of(slots[kNumInstances][n], std::string("attention_forward_combine") + kSuffix[n], index, 0);
}

Kernel schedule_kernel(int index) {
  return kernel_of(schedule_slot, "attention_schedule", index, 0);
}

Kernel quantize_kernel(int index) {
  return kernel_of(quantize_slot, "attention_forward_quantize", index, 0);
}

Kernel append_kernel(int index) {
  return kernel_of(append_slot, "append_kv", index, 0);
}

Kernel named_kernel(const char *name) {
  const Kernel kernel = load(name);
  load_now(kernel);
  return kernel;
}

}  // namespace flashspark::cuda
