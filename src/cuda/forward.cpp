#include "cuda/forward.hpp"

#include <optional>

#include "cuda/arguments.hpp"
#include "cuda/device.hpp"
#include "cuda/fatbins.hpp"
#include "cuda/function_kernel.hpp"
#include "cuda/launch.hpp"
#include "cuda/metadata.hpp"
#include "cuda/module.hpp"
#include "cuda/quantize.hpp"
#include "cuda/workspace.hpp"
#include "error.hpp"

namespace flashspark::cuda {
namespace {

// The launches of one call, and its scratch memory: 16-bit results that are still to be quantized, then partial
// results.
struct CallPlan {
  Plan attention;
  std::optional<QuantizePlan> quantize;
  size_t wide_out = 0;  // bytes

  size_t workspace() const { return wide_out + attention.workspace; }
  void bind(void *memory) {
    if (quantize) attention.arguments.out = quantize->arguments.forward.out = memory;
    attention.bind(static_cast<char *>(memory) + wide_out);
  }
};

CallPlan plan_call(const Params &p) {
  const Machine &machine = device_facts(p.device_index).machine;
  if (!is_quantized(p)) return {.attention = make_plan(p, machine), .quantize = {}};
  const Params wide = with_wide_out(p, nullptr);
  return {
      .attention = make_plan(wide, machine), .quantize = make_quantize_plan(p, wide), .wide_out = wide_out_bytes(p)};
}

void require_shared_memory(const Plan &plan, const DeviceFacts &device) {
  if (plan.forward.shared_bytes <= device.shared_bytes_per_block) return;
  throw Error(FLASHSPARK_UNSUPPORTED, std::string("kernel ") + plan.instance->name + " needs " +
                                          std::to_string(plan.forward.shared_bytes) + " bytes of shared memory, " +
                                          device.name + " has " + std::to_string(device.shared_bytes_per_block));
}

}  // namespace

void forward(const Params &p, const ScratchSource &scratch) {
  check_if_asked(p);
  const DeviceFacts &device = device_facts(p.device_index);
  CallPlan plan = plan_call(p);
  const Plan &attention = plan.attention;
  if (attention.forward.grid[0] == 0) return;  // nothing to compute
  require_shared_memory(attention, device);
  const CurrentDevice current(p.device_index);
  // Kernels before memory: loading one may fail.
  const Kernel kernel = attention.functions
                            ? get_function_kernel(p, attention, *attention.functions, p.device_index)
                            : get(attention.forward_key(), p.device_index, attention.forward.shared_bytes);
  const BlockTilePlan *tiles = attention.block_tiles();
  const Kernel block_tiles = tiles != nullptr ? get({Operation::attention_block_tiles}, p.device_index) : nullptr;
  const bool combines = attention.combine.grid[0] > 0;
  const Kernel combine = combines ? get(attention.combine_key(), p.device_index) : nullptr;
  const Kernel quantize = plan.quantize ? get({Operation::attention_forward_quantize}, p.device_index) : nullptr;
  const Workspace memory({p.workspace, p.workspace_size}, static_cast<Stream>(p.stream), scratch, plan.workspace());
  plan.bind(memory.data());
  const auto put = [&](Kernel each, const Launch &shape, const void *arguments) {
    launch(each, shape, arguments, static_cast<Stream>(p.stream), device.machine.arch);
  };
  if (tiles != nullptr) put(block_tiles, attention.block_tiles_launch(), &tiles->arguments);
  if (attention.functions) {
    const FunctionForwardArguments arguments{attention.arguments, attention.functions->arguments,
                                             attention.functions->dropout_arguments};
    put(kernel, attention.forward, &arguments);
  } else {
    put(kernel, attention.forward, &attention.arguments);
  }
  if (combines) {
    const CombineArguments arguments = attention.combine_arguments();
    put(combine, attention.combine, &arguments);
  }
  if (plan.quantize) put(quantize, plan.quantize->launch, &plan.quantize->arguments);
}

size_t workspace(const Params &p) {
  return plan_call(p).workspace();
}

std::string detail(const Params &p) {
  if (fatbins().empty()) return why_no_fatbins();
  if (p.device != FLASHSPARK_CUDA) return std::string("kernels for ") + fatbin_architectures();
  if (!device_unavailable_reason(p.device_index).empty()) return "not here";
  const DeviceFacts &device = device_facts(p.device_index);
  std::string text = device.name + ", " + architecture_name(device.machine.arch) + " kernels";
  if (!unsupported(p).empty()) return text;
  const Plan plan = plan_call(p).attention;
  if (plan.instance == nullptr) return text;  // no rows
  text += std::string(", ") + plan.instance->name + (plan.dtype == KernelDType::e4m3 ? "_e4m3" : "");
  if (plan.forward.grid[1] > 1) text += ", " + std::to_string(plan.forward.grid[1]) + " splits";
  return text;
}

std::string plan_text(const Params &p) {
  if (!device_unavailable_reason(p.device_index).empty() || !unsupported(p).empty()) return {};
  const CallPlan plan = plan_call(p);
  std::string text = to_string(plan.attention);
  if (plan.quantize && plan.quantize->launch.grid[0] > 0) {
    text += "16-bit results: " + std::to_string(plan.wide_out) + " bytes of scratch memory\n" +
            to_string({Operation::attention_forward_quantize}, plan.quantize->launch) + "\n";
  }
  return text;
}

}  // namespace flashspark::cuda
