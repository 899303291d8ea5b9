#include "cli/gpu_run.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>

#include "cli/system.hpp"
#include "cuda/module.hpp"
#include "error.hpp"
#include "peak.hpp"

namespace flashspark::cli {
namespace {

using cuda::driver;

constexpr OperationTraits kMultiply = traits_of(Operation::mma_peak);

template <class T>
T *at(cuda::Address address) {
  return reinterpret_cast<T *>(address);
}

flashspark_attention_params &forward_of(flashspark_attention_params &p) {
  return p;
}
flashspark_attention_params &forward_of(flashspark_attention_backward_params &p) {
  return p.forward;
}
flashspark_status compute(const flashspark_attention_params &p) {
  return flashspark_attention_forward(&p);
}
flashspark_status compute(const flashspark_attention_backward_params &p) {
  return flashspark_attention_backward(&p);
}

}  // namespace

DeviceMemory::DeviceMemory(size_t bytes) {
  FLASHSPARK_CUDA_CALL(driver(), cuMemAlloc, &address_, std::max<size_t>(bytes, 16));
}
DeviceMemory::~DeviceMemory() {
  if (address_ != 0) driver().cuMemFree(address_);
}
DeviceMemory::DeviceMemory(DeviceMemory &&other) noexcept : address_(std::exchange(other.address_, 0)) {}

Memory::Memory(bool gpu, size_t bytes, std::span<const std::byte> content) {
  if (gpu) {
    device_.emplace(bytes);
  } else if (bytes <= free_memory()) {
    host_ = cases::Buffer(bytes);
  } else {
    throw Error(FLASHSPARK_OUT_OF_MEMORY, fmt::format("{} bytes are not free", bytes));
  }
  size_t done = std::min(bytes, content.size());
  if (done == 0) return;
  if (gpu) {
    FLASHSPARK_CUDA_CALL(driver(), cuMemcpyHtoD, device_->address(), content.data(), done);
  } else {
    std::memcpy(host_.data(), content.data(), done);
  }
  for (size_t n = 0; done < bytes; done += n) {
    n = std::min(done, bytes - done);
    if (gpu) {
      FLASHSPARK_CUDA_CALL(driver(), cuMemcpyDtoDAsync, device_->address() + done, device_->address(), n, nullptr);
    } else {
      std::memcpy(host_.data() + done, host_.data(), n);
    }
  }
}

std::byte *Memory::data() const {
  return device_ ? at<std::byte>(device_->address()) : host_.data();
}

template <class Problem>
GpuProblem<Problem>::GpuProblem(Problem &host, int device) : host_(host), params_(host.params) {
  for (const std::span<std::byte> block : host.memory()) {
    if (block.data() == nullptr) continue;
    blocks_.push_back({block, DeviceMemory(block.size())});
    if (!block.empty())
      FLASHSPARK_CUDA_CALL(driver(), cuMemcpyHtoD, blocks_.back().device.address(), block.data(), block.size());
  }
  move(params_);
  flashspark_attention_params &p = forward_of(params_);
  p.device = FLASHSPARK_CUDA;
  p.device_index = device;
  p.workspace = params_.workspace = nullptr;
  p.workspace_size = params_.workspace_size = 0;
}

template <class Problem>
template <class T>
void GpuProblem<Problem>::move(T *&pointer) const {
  if (pointer == nullptr) return;
  const Block *block = find(pointer);
  if (block == nullptr) throw std::logic_error("params point outside the problem's memory");
  pointer = at<T>(block->device.address() + (reinterpret_cast<const std::byte *>(pointer) - block->host.data()));
}

template <class Problem>
void GpuProblem<Problem>::move(flashspark_attention_params &p) const {
  for (flashspark_tensor *tensor : {&p.q, &p.k, &p.v, &p.out}) move(tensor->data);
  for (flashspark_scale *scale : {&p.q_descale, &p.k_descale, &p.v_descale}) move(scale->data);
  for (const int32_t **numbers :
       {&p.cu_seqlens_q, &p.cu_seqlens_k, &p.seqused_q, &p.seqused_k, &p.leftpad_k, &p.kv_batch_index, &p.page_table,
        &p.causal_per_seq, &p.prefix_ranges, &p.rswa_prefix_lens})
    move(*numbers);
  move(p.output_scale), move(p.sinks), move(p.rel_logits), move(p.alibi_slopes), move(p.dropout_state), move(p.lse);
}

template <class Problem>
void GpuProblem<Problem>::move(flashspark_attention_backward_params &p) const {
  move(p.forward);
  for (flashspark_tensor *tensor : {&p.dout, &p.dq, &p.dk, &p.dv}) move(tensor->data);
  move(p.dlse), move(p.dsinks), move(p.drel_logits), move(p.dalibi_slopes);
}

template <class Problem>
auto GpuProblem<Problem>::find(const void *address) const -> const Block * {
  const auto *byte = static_cast<const std::byte *>(address);
  for (const Block &block : blocks_) {  // an empty block contains no address but its start
    if (byte == block.host.data()) return &block;
  }
  for (const Block &block : blocks_) {
    if (byte > block.host.data() && byte < block.host.data() + block.host.size()) return &block;
  }
  return nullptr;
}

template <class Problem>
flashspark_status GpuProblem<Problem>::launch(const char *implementation) {
  forward_of(params_).implementation = implementation;
  return compute(params_);
}

template <class Problem>
void GpuProblem<Problem>::copy_results_back() {
  for (const std::span<std::byte> block : host_.written_memory()) {
    if (!block.empty())
      FLASHSPARK_CUDA_CALL(driver(), cuMemcpyDtoH, block.data(), find(block.data())->device.address(), block.size());
  }
}

template class GpuProblem<cases::Problem>;
template class GpuProblem<cases::BackwardProblem>;

GpuSession::GpuSession() {
  FLASHSPARK_CUDA_CALL(driver(), cuEventCreate, &start_, 0);
  FLASHSPARK_CUDA_CALL(driver(), cuEventCreate, &end_, 0);
  // The most recent writes stay in L2, so writing twice its size evicts the problem. The time of these writes also
  // hides the launch latency.
  flush_bytes_ = std::max<size_t>(2 * static_cast<size_t>(facts().machine.l2_bytes), size_t{64} << 20);
  flush_.emplace(flush_bytes_);
}

GpuSession::~GpuSession() {
  driver().cuEventDestroy(start_);
  driver().cuEventDestroy(end_);
}

float GpuSession::elapsed(const std::function<void()> &work) {
  FLASHSPARK_CUDA_CALL(driver(), cuEventRecord, start_, nullptr);
  work();
  FLASHSPARK_CUDA_CALL(driver(), cuEventRecord, end_, nullptr);
  FLASHSPARK_CUDA_CALL(driver(), cuEventSynchronize, end_);
  float milliseconds = 0;
  FLASHSPARK_CUDA_CALL(driver(), cuEventElapsedTime, &milliseconds, start_, end_);
  return milliseconds;
}

double GpuSession::time_cold(const std::function<void()> &work) {
  FLASHSPARK_CUDA_CALL(driver(), cuMemsetD8Async, flush_->address(), 0, flush_bytes_, nullptr);
  return 1e-3 * elapsed(work);
}

double GpuSession::time(const std::function<void()> &issue) {
  using Clock = std::chrono::steady_clock;
  if (round_seconds_ == 0) {
    constexpr int32_t kRounds = 1 << 13;
    float best = elapsed([&] { multiply(1, kRounds); });
    for (int n = 0; n < 3; ++n) best = std::min(best, elapsed([&] { multiply(1, kRounds); }));
    round_seconds_ = 1e-3 * best / kRounds;
  }
  for (;;) {
    // mma work in registers keeps the GPU busy, without touching its caches, for twice as long as issuing took last
    // time.
    const double busy = 2 * issue_seconds_ + 20e-6;
    multiply(1, static_cast<int32_t>(std::min(busy / round_seconds_, 1e9)));
    const auto start = Clock::now();
    const float milliseconds = elapsed([&] {
      issue();
      issue_seconds_ = std::chrono::duration<double>(Clock::now() - start).count();
    });
    if (issue_seconds_ < busy) return 1e-3 * milliseconds;
  }
}

void GpuSession::multiply(unsigned blocks, int32_t rounds) {
  const cuda::Kernel kernel = cuda::get({Operation::mma_peak}, 0);
  cuda::Address nowhere = flush_->address();
  void *parameters[] = {&nowhere, &rounds};
  FLASHSPARK_CUDA_CALL(driver(), cuLaunchKernel, reinterpret_cast<cuda::Function>(kernel), blocks, 1, 1,
                       kMultiply.threads, 1, 1, 0, nullptr, parameters, nullptr);
}

double GpuSession::peak_flops() {
  constexpr double kFlopsPerProduct = 2 * 16 * 8 * 16;
  constexpr int32_t kRounds = 1 << 13;
  const unsigned blocks = kMultiply.min_ctas * facts().machine.sm_count;
  const auto run = [&] { multiply(blocks, kRounds); };
  float best = elapsed(run);
  for (int n = 0; n < 20; ++n) best = std::min(best, elapsed(run));
  return blocks * (kMultiply.threads / 32.0) * kRounds * kPeakChains * kFlopsPerProduct / (1e-3 * best);
}

double GpuSession::copy_bytes_per_second() {
  const size_t bytes = std::max<size_t>(size_t{256} << 20, 8 * static_cast<size_t>(facts().machine.l2_bytes));
  const DeviceMemory from(bytes), to(bytes);
  const auto run = [&] {
    FLASHSPARK_CUDA_CALL(driver(), cuMemcpyDtoDAsync, to.address(), from.address(), bytes, nullptr);
  };
  float best = elapsed(run);
  for (int n = 0; n < 10; ++n) best = std::min(best, elapsed(run));
  return 2 * static_cast<double>(bytes) / (1e-3 * best);
}

const Limits &GpuSession::limits() {
  if (!limits_) limits_ = {peak_flops(), copy_bytes_per_second()};
  return *limits_;
}

std::string GpuSession::text() {
  return fmt::format("{}, {} kernels; limits measured here: {:.0f} TFLOP/s bf16 mma.sync, {:.0f} GB/s copy",
                     facts().name, cuda::architecture_name(facts().machine.arch), limits().flops / 1e12,
                     limits().bytes / 1e9);
}

std::string gpu_unavailable_reason() {
  return cuda::device_unavailable_reason(0);
}

std::unique_ptr<GpuSession> open_gpu(bool cpu_only) {
  if (cpu_only || !gpu_unavailable_reason().empty()) return nullptr;
  return std::make_unique<GpuSession>();
}

}  // namespace flashspark::cli
