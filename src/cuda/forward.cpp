#include "cuda/forward.hpp"

#include <bit>

#include "cuda/arguments.hpp"
#include "cuda/device.hpp"
#include "cuda/fatbins.hpp"
#include "cuda/launch.hpp"
#include "cuda/metadata.hpp"
#include "cuda/module.hpp"
#include "cuda/quantize.hpp"
#include "error.hpp"

namespace flashspark::cuda {
namespace {

// Scratch memory of one call: the caller's, or taken and given back in the order of the stream.
class Workspace {
 public:
  Workspace(const Params &p, size_t bytes) : stream_(static_cast<Stream>(p.stream)) {
    if (bytes == 0) return;
    if (p.workspace != nullptr) {
      if (p.workspace_size < bytes)
        fail("workspace_size", std::to_string(p.workspace_size),
             "must be at least " + std::to_string(bytes) + " bytes for this problem, or workspace NULL");
      if (reinterpret_cast<uintptr_t>(p.workspace) % 16 != 0)
        fail("workspace", std::string("misaligned"), "must be aligned to 16 bytes");
      data_ = p.workspace;
      return;
    }
    FLASHSPARK_CUDA_CALL(driver(), cuMemAllocAsync, &own_, bytes, stream_);
    data_ = std::bit_cast<void *>(own_);
  }
  ~Workspace() {
    if (own_ != 0) driver().cuMemFreeAsync(own_, stream_);
  }
  Workspace(const Workspace &) = delete;
  Workspace &operator=(const Workspace &) = delete;

  void *data() const { return data_; }

 private:
  Stream stream_;
  Address own_ = 0;
  void *data_ = nullptr;
};

void forward_16_bit(const Params &p) {
  const DeviceFacts &device = device_facts(p.device_index);
  Plan plan = make_plan(p, device.machine, p.workspace);
  if (plan.forward.grid[0] == 0) return;  // nothing to compute
  if (plan.forward.shared_bytes > device.shared_bytes_per_block) {
    throw Error(FLASHSPARK_UNSUPPORTED, std::string("kernel ") + plan.instance->name + " needs " +
                                            std::to_string(plan.forward.shared_bytes) + " bytes of shared memory, " +
                                            device.name + " has " + std::to_string(device.shared_bytes_per_block));
  }
  const CurrentDevice current(p.device_index);
  const auto stream = static_cast<Stream>(p.stream);
  const Kernel kernel = get(plan.forward_key(), p.device_index, plan.forward.shared_bytes);
  const bool combines = plan.combine.grid[0] > 0;
  const Kernel combine = combines ? get(plan.combine_key(), p.device_index) : nullptr;
  const Workspace memory(p, plan.workspace);
  if (plan.workspace > 0 && p.workspace == nullptr) plan = make_plan(p, device.machine, memory.data(), plan.instance);
  const Architecture arch = device.machine.arch;
  launch(kernel, plan.forward, &plan.arguments, stream, arch);
  if (combines) launch(combine, plan.combine, &plan.arguments, stream, arch);
}

// Results in e4m3: the kernels write 16-bit numbers to scratch memory, which one more launch divides and rounds.
void forward_quantized(const Params &p) {
  const size_t bytes = wide_out_bytes(p);
  const CurrentDevice current(p.device_index);
  const Workspace memory(p, p.workspace != nullptr ? workspace(p) : bytes);
  Params wide = with_wide_out(p, memory.data());
  if (p.workspace != nullptr) {
    wide.workspace = static_cast<char *>(p.workspace) + bytes;
    wide.workspace_size = p.workspace_size - bytes;
  }
  forward_16_bit(wide);
  const QuantizePlan plan = make_quantize_plan(p, wide);
  if (plan.launch.grid[0] == 0) return;
  launch(get({Operation::attention_forward_quantize}, p.device_index), plan.launch, &plan.arguments,
         static_cast<Stream>(p.stream), device_facts(p.device_index).machine.arch);
}

}  // namespace

void forward(const Params &p) {
  check_if_asked(p);
  is_quantized(p) ? forward_quantized(p) : forward_16_bit(p);
}

size_t workspace(const Params &p) {
  const Machine &machine = device_facts(p.device_index).machine;
  if (!is_quantized(p)) return make_plan(p, machine, nullptr).workspace;
  return wide_out_bytes(p) + make_plan(with_wide_out(p, nullptr), machine, nullptr).workspace;
}

namespace {
Plan schedule_plan(const Params &p) {
  if (const std::string reason = device_unavailable_reason(p.device_index); !reason.empty())
    throw Error(FLASHSPARK_UNSUPPORTED, "schedule: no implementation fits: cuda: " + reason);
  Plan plan = make_plan(p, device_facts(p.device_index).machine, nullptr);
  // What the calls will have room for is not known here, only that positions have 32 bits: the calls cut what they
  // read.
  plan.arguments.key_rows = max_key_rows(p, plan.arguments);
  plan.arguments.last_batch = INT32_MAX;
  return plan;
}
}  // namespace

int64_t schedule_size(const Params &p) {
  return schedule_plan(p).schedule_size();
}

void schedule(const Params &p) {
  const Plan plan = schedule_plan(p);
  const int64_t size = plan.schedule_size();
  if (size == 0) return;
  if (p.scheduler_metadata == nullptr)
    fail("scheduler_metadata", std::string("NULL"), "must point to " + std::to_string(size) + " elements");
  if (p.scheduler_metadata_size < size)
    fail("scheduler_metadata_size", p.scheduler_metadata_size, "must be at least " + std::to_string(size));
  const CurrentDevice current(p.device_index);
  launch(get({Operation::attention_schedule}, p.device_index), plan.schedule(), &plan.arguments,
         static_cast<Stream>(p.stream), device_facts(p.device_index).machine.arch);
}

std::string detail(const Params &p) {
  if (fatbins().empty()) return "built without CUDA kernels";
  if (p.device != FLASHSPARK_CUDA) return std::string("kernels for ") + fatbin_architectures();
  if (const std::string reason = device_unavailable_reason(p.device_index); !reason.empty()) return "not here";
  const DeviceFacts &device = device_facts(p.device_index);
  std::string text = device.name + ", " + architecture_name(device.machine.arch) + " kernels";
  if (!unsupported(p).empty()) return text;
  const Plan plan = make_plan(is_quantized(p) ? with_wide_out(p, nullptr) : p, device.machine, nullptr);
  if (plan.instance == nullptr) return text;  // no rows
  text += std::string(", ") + plan.instance->name + (plan.dtype == KernelDType::e4m3 ? "_e4m3" : "");
  if (plan.forward.grid[1] > 1) text += ", " + std::to_string(plan.forward.grid[1]) + " splits";
  return text;
}

std::string unavailable(const Params &p) {
  std::string reason = device_unavailable_reason(p.device_index);
  return reason.empty() ? unsupported(p) : reason;
}

}  // namespace flashspark::cuda
