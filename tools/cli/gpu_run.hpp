// Problems on a GPU: their memory, their time, and what the GPU could do at best. Through the driver API alone.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cases/cases.hpp"
#include "cli/machine.hpp"
#include "cuda/device.hpp"

namespace flashspark::cli {

constexpr const char *kGpuImplementation = "cuda";

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory &&other) noexcept;
  DeviceMemory &operator=(DeviceMemory &&) = delete;

  cuda::Address address() const { return address_; }

 private:
  cuda::Address address_ = 0;
};

// Bytes on the GPU or here, filled with copies of `content`. Throws Error (OUT_OF_MEMORY) where so many are not free.
class Memory {
 public:
  Memory(bool gpu, size_t bytes, std::span<const std::byte> content = {});
  std::byte *data() const;

 private:
  std::optional<DeviceMemory> device_;
  cases::Buffer host_;
};

// A copy of a problem's memory, and params that point into it.
class GpuProblem {
 public:
  GpuProblem(cases::Problem &host, int device);
  const flashspark_attention_params &params() const { return params_; }
  flashspark_status launch(const char *implementation);  // NULL: what dispatch chooses
  void copy_results_back();                              // waits for the GPU

 private:
  struct Block {
    std::span<std::byte> host;
    DeviceMemory device;
  };
  const Block *find(const void *address) const;

  cases::Problem &host_;
  std::vector<Block> blocks_;
  flashspark_attention_params params_;
};

// Device 0, its context current on this thread.
class GpuSession {
 public:
  GpuSession();
  ~GpuSession();
  GpuSession(const GpuSession &) = delete;
  GpuSession &operator=(const GpuSession &) = delete;
  // Seconds of one call with nothing in L2 of what it reads, measured on the GPU.
  double time(GpuProblem &problem, const char *implementation, flashspark_status &status);
  // Seconds that the GPU takes for what `issue` puts into its queue, which it begins when all of it is there. May call
  // `issue` again, until that was so.
  double time(const std::function<void()> &issue);
  const cuda::DeviceFacts &facts() const { return cuda::device_facts(0); }
  const Limits &limits();  // mma.sync in registers, bf16; a copy within the GPU's memory
  std::string text();      // "NVIDIA H200, sm_90 kernels; limits measured here: ..."

 private:
  float elapsed(const std::function<void()> &work);  // milliseconds
  void multiply(unsigned blocks, int32_t rounds);    // in registers, for that long
  double peak_flops();
  double copy_bytes_per_second();

  cuda::CurrentDevice current_{0};
  cuda::Event start_ = nullptr, end_ = nullptr;
  std::optional<DeviceMemory> flush_;
  size_t flush_bytes_ = 0;
  double round_seconds_ = 0, issue_seconds_ = 1e-4;  // a round of multiply(), and what the last time() issued
  std::optional<Limits> limits_;
};

// Why device 0 cannot run the kernels, in words; empty: it can.
std::string gpu_lack();

// NULL where there is no usable GPU, or where --cpu asks for none.
std::unique_ptr<GpuSession> open_gpu(bool cpu_only);

}  // namespace flashspark::cli
