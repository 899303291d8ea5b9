// The CUDA driver API, loaded from the driver's library when it is first needed, since this library is built and loaded
// on machines without it. The few declarations that it uses are written out here, so building needs no toolkit either.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace flashspark::cuda {

// CUresult, CUdevice and the enums are ints; handles are pointers to types of the driver; CUdeviceptr is an address.
using Result = int;
using Device = int;
using Context = struct ContextObject *;
using Stream = struct StreamObject *;
using Event = struct EventObject *;
using Library = struct LibraryObject *;
using Kernel = struct KernelObject *;
using Function = struct FunctionObject *;
using Address = uint64_t;

#if defined(_WIN32)
constexpr char kDriverFile[] = "nvcuda.dll";
#else
constexpr char kDriverFile[] = "libcuda.so.1";
#endif

constexpr Result kSuccess = 0, kOutOfMemory = 2, kNotInitialized = 3, kStubLibrary = 34, kDeviceUnavailable = 46,
                 kNoDevice = 100, kSystemNotReady = 802, kDriverMismatch = 803, kCompatNotSupported = 804;

// CUdevice_attribute.
constexpr int kSmCount = 16, kL2Bytes = 38, kMajor = 75, kMinor = 76, kSharedBytesPerSm = 81, kSharedBytesPerBlock = 97;
// CUfunction_attribute.
constexpr int kMaxDynamicSharedBytes = 8;
// CUlaunchAttributeID.
constexpr int kProgrammaticStreamSerialization = 6;
// CUstreamCaptureMode.
constexpr int kCaptureRelaxed = 2;

// CUlaunchAttribute: the value is a union of 64 bytes; the member that is set here is an int.
struct alignas(8) LaunchAttribute {
  int id;
  int padding;
  int value[16];
};
// CUlaunchConfig.
struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  Stream stream;
  LaunchAttribute *attributes;
  unsigned num_attributes;
};

// Names and prototypes, of the newest versions up to kDriverVersion, which are those that cuGetProcAddress gives.
constexpr int kDriverVersion = 12000;
// What drivers must offer to load the kernels, which are compressed by nvcc's --compress-mode=size: those before 550 do
// not read that. From 580 on, they load what any CUDA 13 has compiled.
constexpr int kOldestLoadingVersion = 12040, kCertainlyLoadingVersion = 13000;
#define FLASHSPARK_DRIVER_FUNCTIONS(F)                                                                                \
  F(cuInit, Result(unsigned))                                                                                         \
  F(cuDriverGetVersion, Result(int *))                                                                                \
  F(cuDeviceGetCount, Result(int *))                                                                                  \
  F(cuDeviceGet, Result(Device *, int))                                                                               \
  F(cuDeviceGetName, Result(char *, int, Device))                                                                     \
  F(cuDeviceTotalMem, Result(size_t *, Device))                                                                       \
  F(cuDeviceGetAttribute, Result(int *, int, Device))                                                                 \
  F(cuDevicePrimaryCtxRetain, Result(Context *, Device))                                                              \
  F(cuCtxGetCurrent, Result(Context *))                                                                               \
  F(cuCtxGetDevice, Result(Device *))                                                                                 \
  F(cuCtxPushCurrent, Result(Context))                                                                                \
  F(cuCtxPopCurrent, Result(Context *))                                                                               \
  F(cuCtxSynchronize, Result())                                                                                       \
  F(cuThreadExchangeStreamCaptureMode, Result(int *))                                                                 \
  F(cuLibraryLoadData, Result(Library *, const void *, int *, void **, unsigned, int *, void **, unsigned))           \
  F(cuLibraryGetKernel, Result(Kernel *, Library, const char *))                                                      \
  F(cuKernelGetFunction, Result(Function *, Kernel))                                                                  \
  F(cuKernelSetAttribute, Result(int, int, Kernel, Device))                                                           \
  F(cuLaunchKernel,                                                                                                   \
    Result(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void **, void **)) \
  F(cuLaunchKernelEx, Result(const LaunchConfig *, Function, void **, void **))                                       \
  F(cuStreamIsCapturing, Result(Stream, int *))                                                                       \
  F(cuStreamSynchronize, Result(Stream))                                                                              \
  F(cuMemAllocAsync, Result(Address *, size_t, Stream))                                                               \
  F(cuMemFreeAsync, Result(Address, Stream))                                                                          \
  F(cuMemAlloc, Result(Address *, size_t))                                                                            \
  F(cuMemFree, Result(Address))                                                                                       \
  F(cuMemcpyHtoD, Result(Address, const void *, size_t))                                                              \
  F(cuMemcpyDtoH, Result(void *, Address, size_t))                                                                    \
  F(cuMemcpyDtoDAsync, Result(Address, Address, size_t, Stream))                                                      \
  F(cuMemsetD8Async, Result(Address, unsigned char, size_t, Stream))                                                  \
  F(cuEventCreate, Result(Event *, unsigned))                                                                         \
  F(cuEventDestroy, Result(Event))                                                                                    \
  F(cuEventRecord, Result(Event, Stream))                                                                             \
  F(cuEventSynchronize, Result(Event))                                                                                \
  F(cuEventElapsedTime, Result(float *, Event, Event))                                                                \
  F(cuGetErrorName, Result(Result, const char **))

struct Driver {
  std::string unavailable_reason;  // why there is none, in words; the functions may be NULL then
  bool found = false;              // kDriverFile is there
  Result init_result = kSuccess;   // of cuInit
  int version = 0;                 // 13000: CUDA 13.0
  int device_count = 0;
#define FLASHSPARK_DRIVER_POINTER(name, ...) std::add_pointer_t<__VA_ARGS__> name = nullptr;
  FLASHSPARK_DRIVER_FUNCTIONS(FLASHSPARK_DRIVER_POINTER)
#undef FLASHSPARK_DRIVER_POINTER
};

// Loaded and initialised by the first call. Throws Error (DEVICE_ERROR) in a child that was forked after that: the
// driver does not survive a fork.
const Driver &driver();

// "cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS (700)"
std::string error_text(const Driver &driver, const char *function, Result result);

// 12040: "CUDA 12.4"
std::string version_text(int version);

// The GPUs that CUDA_VISIBLE_DEVICES leaves, as an addition to a message: " with CUDA_VISIBLE_DEVICES=7"; "" if it is
// not set.
std::string visible_devices_text();

// What to do about a driver that is too old, as an addition to a message.
constexpr char kUpdateDriver[] = "; update it to version 580 or newer";

// Throws Error: OUT_OF_MEMORY, or DEVICE_ERROR.
void require(Result result, const char *function);
#define FLASHSPARK_CUDA_CALL(driver, function, ...) \
  ::flashspark::cuda::require((driver).function(__VA_ARGS__), #function)

}  // namespace flashspark::cuda
