#include "cuda/fake_cuda.hpp"

#include <cstdlib>
#include <cstring>
#include <list>
#include <map>

using namespace flashspark::cuda;
using fake_cuda::state;

namespace flashspark::cuda {
struct ContextObject {
  int device;
};
struct LibraryObject {
  const void *image;
};
struct KernelObject {
  const void *image;
  std::string function;
  std::map<int, int> shared_bytes;  // by device
};
}  // namespace flashspark::cuda

namespace {

constexpr Result kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201, kCaptureUnsupported = 900;
constexpr int kAlwaysAllowed = 48 << 10;
constexpr size_t kMemory = size_t{16} << 30;

thread_local std::vector<ContextObject *> contexts;
thread_local int capture_mode = 0;  // CU_STREAM_CAPTURE_MODE_GLOBAL, the strictest

bool known(int device) {
  return device >= 0 && device < static_cast<int>(state().devices.size());
}

ContextObject *context_of(int device) {
  static std::map<int, ContextObject> all;
  return &all.try_emplace(device, ContextObject{device}).first->second;
}

Result fakeInit(unsigned) {
  return state().init_result;
}
Result fakeDriverGetVersion(int *version) {
  *version = state().version;
  return kSuccess;
}
Result fakeDeviceGetCount(int *count) {
  *count = static_cast<int>(state().devices.size());
  return kSuccess;
}
Result fakeDeviceGet(Device *device, int index) {
  *device = index;
  return known(index) ? kSuccess : kInvalidDevice;
}
Result fakeDeviceGetName(char *name, int size, Device device) {
  std::strncpy(name, state().devices[device].name.c_str(), size);
  return kSuccess;
}
Result fakeDeviceTotalMem(size_t *bytes, Device) {
  *bytes = kMemory;
  return kSuccess;
}
Result fakeDeviceGetAttribute(int *value, int which, Device device) {
  const fake_cuda::Device &d = state().devices[device];
  const std::map<int, int> values{
      {kSmCount, d.sm_count}, {kL2Bytes, 24 << 20},           {kMajor, d.major},
      {kMinor, d.minor},      {kSharedBytesPerSm, 100 << 10}, {kSharedBytesPerBlock, 99 << 10}};
  const auto found = values.find(which);
  if (found == values.end()) return kInvalidValue;
  *value = found->second;
  return kSuccess;
}
Result fakeDevicePrimaryCtxRetain(Context *context, Device device) {
  const std::lock_guard lock(state().mutex);
  *context = context_of(device);
  return kSuccess;
}
Result fakeCtxGetCurrent(Context *context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return kSuccess;
}
Result fakeCtxGetDevice(Device *device) {
  if (contexts.empty()) return kInvalidContext;
  *device = contexts.back()->device;
  return kSuccess;
}
Result fakeCtxPushCurrent(Context context) {
  contexts.push_back(context);
  const std::lock_guard lock(state().mutex);
  ++state().pushes;
  return kSuccess;
}
Result fakeCtxPopCurrent(Context *context) {
  if (contexts.empty()) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  const std::lock_guard lock(state().mutex);
  ++state().pops;
  return kSuccess;
}
Result fakeThreadExchangeStreamCaptureMode(int *mode) {
  std::swap(*mode, capture_mode);
  return kSuccess;
}
bool forbidden() {
  return contexts.empty() || (state().capturing && capture_mode != kCaptureRelaxed);
}
Result fakeLibraryLoadData(Library *library, const void *image, int *, void **, unsigned, int *, void **, unsigned) {
  const std::lock_guard lock(state().mutex);
  if (forbidden()) return kCaptureUnsupported;
  if (state().load_result != kSuccess) return state().load_result;
  state().loads.push_back(image);
  static std::list<LibraryObject> loaded;
  *library = &loaded.emplace_back(LibraryObject{image});
  return kSuccess;
}
Result fakeLibraryGetKernel(Kernel *kernel, Library library, const char *name) {
  static std::list<KernelObject> kernels;
  const std::lock_guard lock(state().mutex);
  *kernel = &kernels.emplace_back(KernelObject{library->image, name, {}});
  return kSuccess;
}
Result fakeKernelGetFunction(Function *function, Kernel kernel) {
  const std::lock_guard lock(state().mutex);
  if (forbidden()) return kCaptureUnsupported;
  *function = reinterpret_cast<Function>(kernel);
  return kSuccess;
}
Result fakeKernelSetAttribute(int which, int value, Kernel kernel, Device device) {
  if (which != kMaxDynamicSharedBytes) return kInvalidValue;
  kernel->shared_bytes[device] = value;
  return kSuccess;
}
Result fakeLaunchKernel(Function function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                        unsigned shared_bytes, Stream stream, void **parameters, void **) {
  if (contexts.empty()) return kInvalidContext;
  auto *kernel = reinterpret_cast<KernelObject *>(function);
  const std::lock_guard lock(state().mutex);
  const int device = contexts.back()->device;
  const auto allowed = kernel->shared_bytes.find(device);
  const int limit = allowed == kernel->shared_bytes.end() ? kAlwaysAllowed : allowed->second;
  if (static_cast<int>(shared_bytes) > limit || x == 0 || y == 0 || z == 0) return kInvalidValue;
  if (state().launch_result != kSuccess) return state().launch_result;
  fake_cuda::Launch launch{
      kernel->image, kernel->function, device, {x, y, z}, threads, shared_bytes, stream, {}, {}, {}, {}, false};
  if (kernel->function == "flashspark_append_kv") {
    std::memcpy(&launch.append, parameters[0], sizeof launch.append);
  } else if (kernel->function == "flashspark_attention_backward_clear") {
    std::memcpy(&launch.clear, parameters[0], sizeof launch.clear);
  } else if (kernel->function == "flashspark_attention_backward_round") {
    std::memcpy(&launch.round, parameters[0], sizeof launch.round);
  } else if (kernel->function == "flashspark_attention_backward_blocks") {
    std::memcpy(&launch.blocks, parameters[0], sizeof launch.blocks);
  } else if (kernel->function == "flashspark_attention_backward_functions") {
    std::memcpy(&launch.backward_functions, parameters[0], sizeof launch.backward_functions);
  } else if (kernel->function.starts_with("flashspark_attention_backward")) {
    std::memcpy(&launch.backward, parameters[0], sizeof launch.backward);
  } else if (kernel->function == "flashspark_attention_block_tiles") {
    std::memcpy(&launch.block_tiles, parameters[0], sizeof launch.block_tiles);
  } else if (kernel->function == "flashspark_attention_schedule") {
    const auto &arguments = *static_cast<const flashspark::ScheduleArguments *>(parameters[0]);
    static_cast<flashspark::SequenceArguments &>(launch.arguments) = arguments;
    static_cast<flashspark::TileSchedulerArguments &>(launch.arguments) = arguments;
  } else if (kernel->function.starts_with("flashspark_attention_forward_combine")) {
    const auto &arguments = *static_cast<const flashspark::CombineArguments *>(parameters[0]);
    static_cast<flashspark::AttentionArguments &>(launch.arguments) = arguments;
    static_cast<flashspark::TileSchedulerArguments &>(launch.arguments) = arguments;
    static_cast<flashspark::PartialArguments &>(launch.arguments) = arguments;
  } else if (kernel->function != "flashspark_mma_peak") {
    std::memcpy(&launch.arguments, parameters[0], sizeof launch.arguments);
  }
  state().launches.push_back(launch);
  state().order.push_back(kernel->function);
  return kSuccess;
}
Result fakeLaunchKernelEx(const LaunchConfig *config, Function function, void **parameters, void **extra) {
  const auto &[grid, block, shared_bytes, stream, attributes, num_attributes] = *config;
  const Result result = fakeLaunchKernel(function, grid[0], grid[1], grid[2], block[0], block[1], block[2],
                                         shared_bytes, stream, parameters, extra);
  const std::lock_guard lock(state().mutex);
  if (result == kSuccess && num_attributes == 1)
    state().launches.back().early = attributes->id == kProgrammaticStreamSerialization && attributes->value[0] == 1;
  return result;
}
Result fakeMemAllocAsync(Address *address, size_t bytes, Stream) {
  const std::lock_guard lock(state().mutex);
  if (contexts.empty()) return kInvalidContext;
  if (state().allocate_result != kSuccess) return state().allocate_result;
  *address = 0x7000'0000;
  state().order.push_back("alloc " + std::to_string(bytes));
  return kSuccess;
}
Result fakeMemFreeAsync(Address address, Stream) {
  const std::lock_guard lock(state().mutex);
  state().order.push_back("free");
  return address == 0x7000'0000 ? kSuccess : kInvalidValue;
}
// Device memory is host memory; no kernel ever writes to it.
Result fakeMemAlloc(Address *address, size_t bytes) {
  if (bytes > kMemory) return kOutOfMemory;
  *address = reinterpret_cast<Address>(std::malloc(bytes));
  return contexts.empty() ? kInvalidContext : kSuccess;
}
Result fakeMemFree(Address address) {
  std::free(reinterpret_cast<void *>(address));
  return kSuccess;
}
Result fakeMemcpyHtoD(Address to, const void *from, size_t bytes) {
  std::memcpy(reinterpret_cast<void *>(to), from, bytes);
  return kSuccess;
}
Result fakeMemcpyDtoH(void *to, Address from, size_t bytes) {
  std::memcpy(to, reinterpret_cast<const void *>(from), bytes);
  return kSuccess;
}
Result fakeStreamIsCapturing(Stream, int *status) {
  *status = state().capturing ? 1 : 0;
  return kSuccess;
}
Result fakeStreamSynchronize(Stream) {
  const std::lock_guard lock(state().mutex);
  state().order.push_back("synchronize");
  return kSuccess;
}
Result fakeMemcpyDtoDAsync(Address, Address, size_t, Stream) {
  return kSuccess;
}
Result fakeMemsetD8Async(Address, unsigned char, size_t bytes, Stream) {
  const std::lock_guard lock(state().mutex);
  state().order.push_back("zero " + std::to_string(bytes));
  return kSuccess;
}
Result fakeEventCreate(Event *event, unsigned) {
  *event = nullptr;
  return kSuccess;
}
Result fakeEventDestroy(Event) {
  return kSuccess;
}
Result fakeEventRecord(Event, Stream) {
  return kSuccess;
}
Result fakeEventSynchronize(Event) {
  return kSuccess;
}
Result fakeEventElapsedTime(float *milliseconds, Event, Event) {
  *milliseconds = 1;
  return kSuccess;
}
Result fakeGetErrorName(Result result, const char **name) {
  static const std::map<Result, const char *> names{{2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                    {3, "CUDA_ERROR_NOT_INITIALIZED"},
                                                    {34, "CUDA_ERROR_STUB_LIBRARY"},
                                                    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE"},
                                                    {200, "CUDA_ERROR_INVALID_IMAGE"},
                                                    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                                    {802, "CUDA_ERROR_SYSTEM_NOT_READY"},
                                                    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
                                                    {804, "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE"},
                                                    {999, "CUDA_ERROR_UNKNOWN"}};
  const auto found = names.find(result);
  if (found == names.end()) return kInvalidValue;
  *name = found->second;
  return kSuccess;
}
fake_cuda::State *state_of_environment() {
  auto *s = new fake_cuda::State;  // never destroyed: buffers are freed until the process ends
  const auto number = [](const char *name, int &value) {
    if (const char *text = std::getenv(name)) value = std::atoi(text);
  };
  number("FAKE_CUDA_INIT", s->init_result);
  number("FAKE_CUDA_LOAD", s->load_result);
  number("FAKE_CUDA_VERSION", s->version);
  if (const char *name = std::getenv("FAKE_CUDA_DEVICE")) s->devices = {{name}};
  number("FAKE_CUDA_SMS", s->devices[0].sm_count);
  return s;
}
// Stub of the functions that no test reaches.
Result unreachable() {
  return kInvalidValue;
}

}  // namespace

fake_cuda::State &fake_cuda::state() {
  static State *const instance = state_of_environment();
  return *instance;
}

int fake_cuda::current_device() {
  return contexts.empty() ? -1 : contexts.back()->device;
}

std::string fake_cuda::function_of(Kernel kernel) {
  return kernel->function;
}

void fake_cuda::set_current_device(int n) {
  contexts.clear();
  if (n >= 0) contexts.push_back(context_of(n));
}

extern "C" __attribute__((visibility("default"))) int cuGetProcAddress_v2(const char *symbol, void **address, int,
                                                                          uint64_t, int *) {
#define FAKE(name) {"cu" #name, reinterpret_cast<void *>(fake##name)}
  static const std::map<std::string, void *> table{FAKE(Init),
                                                   FAKE(DriverGetVersion),
                                                   FAKE(DeviceGetCount),
                                                   FAKE(DeviceGet),
                                                   FAKE(DeviceGetName),
                                                   FAKE(DeviceGetAttribute),
                                                   FAKE(DeviceTotalMem),
                                                   FAKE(DevicePrimaryCtxRetain),
                                                   FAKE(CtxGetCurrent),
                                                   FAKE(CtxGetDevice),
                                                   FAKE(CtxPushCurrent),
                                                   FAKE(CtxPopCurrent),
                                                   FAKE(ThreadExchangeStreamCaptureMode),
                                                   FAKE(LibraryLoadData),
                                                   FAKE(LibraryGetKernel),
                                                   FAKE(KernelGetFunction),
                                                   FAKE(KernelSetAttribute),
                                                   FAKE(LaunchKernel),
                                                   FAKE(LaunchKernelEx),
                                                   FAKE(StreamIsCapturing),
                                                   FAKE(StreamSynchronize),
                                                   FAKE(MemAllocAsync),
                                                   FAKE(MemFreeAsync),
                                                   FAKE(MemAlloc),
                                                   FAKE(MemFree),
                                                   FAKE(MemcpyHtoD),
                                                   FAKE(MemcpyDtoH),
                                                   FAKE(MemcpyDtoDAsync),
                                                   FAKE(MemsetD8Async),
                                                   FAKE(EventCreate),
                                                   FAKE(EventDestroy),
                                                   FAKE(EventRecord),
                                                   FAKE(EventSynchronize),
                                                   FAKE(EventElapsedTime),
                                                   FAKE(GetErrorName)};
#undef FAKE
  const auto found = table.find(symbol);
  *address = found == table.end() ? reinterpret_cast<void *>(unreachable) : found->second;
  return kSuccess;
}
