#include "cuda/function_kernel.hpp"

#include <compare>

#include "cuda/device.hpp"
#include "cuda/loaded_kernels.hpp"
#include "graph/cuda_source.hpp"
#include "mod.hpp"

namespace flashspark::cuda {
namespace {

// What tells one kernel from another. Equal functions have equal ids, whoever made them.
struct FunctionKernelKey {
  uint64_t score, mask;  // flashspark_mod::id; 0: none
  InstanceIndex instance;
  KernelDType dtype;
  bool native, block_sparse, block_tiles, wide_positions, dropout, contiguous;
  int device;

  auto operator<=>(const FunctionKernelKey &) const = default;
};

uint64_t id_of(const flashspark_mod *mod) {
  return mod != nullptr ? mod->id : 0;
}

std::string macro(const char *name, const std::string &value) {
  return std::string(name) + "=" + value;
}

}  // namespace

CompileRequest function_request(const Params &p, const Plan &plan, const FunctionPlan &functions, Architecture arch) {
  const auto graph_of = [](const flashspark_mod *mod) { return mod != nullptr ? &mod->graph : nullptr; };
  CompileRequest request;
  request.entry = "flashspark_attention_forward_functions";
  request.architecture = architecture_name(arch);
  request.source = "#include \"forward/function.cu\"\n";
  request.headers = {{"user_functions.cuh", graph::cuda_source(graph_of(p.score_mod.mod), graph_of(p.mask_mod.mod),
                                                               {.wide_positions = functions.wide_positions})
                                                .text}};
  request.macros = {macro("FLASHSPARK_NAME", plan.instance->name),
                    macro("FLASHSPARK_NATIVE", functions.native ? "1" : "0"),
                    macro("FLASHSPARK_BLOCK_SPARSE", functions.block_tiles    ? "2"
                                                     : functions.block_sparse ? "1"
                                                                              : "0"),
                    macro("FLASHSPARK_DROPOUT", functions.dropout ? "1" : "0"),
                    macro("FLASHSPARK_CONTIGUOUS", functions.contiguous ? "1" : "0"),
                    "FLASHSPARK_USER_FUNCTIONS=\"user_functions.cuh\""};
  if (plan.dtype == KernelDType::e4m3) request.macros.emplace_back("FLASHSPARK_ELEMENT_KV=E4m3");
  request.macros.push_back(macro("FLASHSPARK_ELEMENT", plan.dtype == KernelDType::bf16 ? "Bfloat16" : "Float16"));
  if (plan.dtype != KernelDType::fp16) request.macros.emplace_back("FLASHSPARK_FAST_TANH");
  return request;
}

Kernel get_function_kernel(const Params &p, const Plan &plan, const FunctionPlan &functions, int index) {
  const FunctionKernelKey key{id_of(p.score_mod.mod),
                              id_of(p.mask_mod.mod),
                              plan.instance->index,
                              plan.dtype,
                              functions.native,
                              functions.block_sparse,
                              functions.block_tiles.has_value(),
                              functions.wide_positions,
                              functions.dropout,
                              functions.contiguous,
                              index};
  static auto *kernels = new LoadedKernels<FunctionKernelKey>;
  return kernels->get(key, index, plan.forward.shared_bytes,
                      [&] { return function_request(p, plan, functions, device_facts(index).machine.arch); });
}

}  // namespace flashspark::cuda
