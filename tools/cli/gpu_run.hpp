// Runs problems on a GPU through the driver API: their memory, their time, and the limits of the GPU.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cases/backward.hpp"
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

// Memory on the GPU or on the host, filled with copies of `content`. Throws Error (OUT_OF_MEMORY) if it cannot be
// allocated.
class Memory {
 public:
  Memory(bool gpu, size_t bytes, std::span<const std::byte> content = {});
  std::byte *data() const;

 private:
  std::optional<DeviceMemory> device_;
  cases::Buffer host_;
};

// A copy of a problem's memory, with params that point into it. Problem: cases::Problem or BackwardProblem.
template <class Problem>
class GpuProblem {
 public:
  using Params = decltype(Problem::params);
  GpuProblem(Problem &host, int device);
  const Params &params() const { return params_; }
  flashspark_status launch(const char *implementation);  // NULL: what dispatch chooses
  void copy_results_back();                              // waits for the GPU to finish

 private:
  struct Block {
    std::span<std::byte> host;
    DeviceMemory device;
  };
  const Block *find(const void *address) const;
  void move(flashspark_attention_params &p) const;
  void move(flashspark_attention_backward_params &p) const;
  template <class T>
  void move(T *&pointer) const;  // from the problem's memory to its copy

  Problem &host_;
  std::vector<Block> blocks_;
  Params params_;
};

// Device 0, with its context current on this thread.
class GpuSession {
 public:
  GpuSession();
  ~GpuSession();
  GpuSession(const GpuSession &) = delete;
  GpuSession &operator=(const GpuSession &) = delete;
  // Seconds of one call, measured on the GPU, with none of its inputs in L2.
  template <class Problem>
  double time(GpuProblem<Problem> &problem, const char *implementation, flashspark_status &status) {
    return time_cold([&] { status = problem.launch(implementation); });
  }
  // Seconds that the GPU takes for the work that `issue` enqueues, from the moment when all of it is enqueued. Calls
  // `issue` again if the GPU started before that.
  double time(const std::function<void()> &issue);
  const cuda::DeviceFacts &facts() const { return cuda::device_facts(0); }
  const Limits &limits();  // bf16 mma.sync in registers; a copy within GPU memory
  std::string text();      // "NVIDIA H200, sm_90 kernels; limits measured here: ..."

 private:
  float elapsed(const std::function<void()> &work);  // in milliseconds
  double time_cold(const std::function<void()> &work);
  void multiply(unsigned blocks, int32_t rounds);  // that many rounds of mma.sync in registers
  double peak_flops();
  double copy_bytes_per_second();

  cuda::CurrentDevice current_{0};
  cuda::Event start_ = nullptr, end_ = nullptr;
  std::optional<DeviceMemory> flush_;
  size_t flush_bytes_ = 0;
  // seconds of a round of multiply(), and of the last issue() in time()
  double round_seconds_ = 0, issue_seconds_ = 1e-4;
  std::optional<Limits> limits_;
};

// Why device 0 cannot run the kernels; empty if it can.
std::string gpu_unavailable_reason();

// NULL if there is no usable GPU or --cpu is given.
std::unique_ptr<GpuSession> open_gpu(bool cpu_only);

}  // namespace flashspark::cli
