#include "cuda/backward_functions.hpp"

#include <algorithm>
#include <compare>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "backward/function_memory.hpp"
#include "cuda/arguments.hpp"
#include "cuda/block_tiles.hpp"
#include "cuda/device.hpp"
#include "cuda/function_plan.hpp"
#include "cuda/heuristics.hpp"
#include "cuda/loaded_kernels.hpp"
#include "error.hpp"
#include "graph/cuda_source.hpp"
#include "mod.hpp"

namespace flashspark::cuda {
namespace {

uint64_t id_of(const flashspark_mod *mod) {
  return mod != nullptr ? mod->id : 0;
}

struct SourceKey {
  uint64_t score, mask;  // flashspark_mod::id; 0: none
  uint32_t wanted;
  bool wide_positions, hands_on;

  auto operator<=>(const SourceKey &) const = default;
};

SourceKey source_key(const Params &p, const BackwardFunctionPlan &plan) {
  return {id_of(p.score_mod.mod), id_of(p.mask_mod.mod), plan.wanted, plan.wide_positions, plan.hands_on};
}

// The text of the functions and of their derivatives, which is kept: a plan asks how many words it has.
const graph::CudaSource &source_of(const Params &p, const BackwardFunctionPlan &plan) {
  static std::mutex mutex;
  static auto *sources = new std::map<SourceKey, graph::CudaSource>;
  const std::lock_guard lock(mutex);
  const SourceKey key = source_key(p, plan);
  if (const auto known = sources->find(key); known != sources->end()) return known->second;
  std::optional<graph::ScoreGradients> score;
  if (p.score_mod.mod != nullptr) score = graph::score_gradients(p.score_mod.mod->graph, plan.wanted);
  const graph::Graph *mask = p.mask_mod.mod != nullptr ? &p.mask_mod.mod->graph : nullptr;
  return (*sources)[key] = graph::cuda_gradient_source(
             score ? &*score : nullptr, mask, {.wide_positions = plan.wide_positions, .biases = plan.hands_on});
}

bool is_wanted(const BackwardParams &p, int32_t tensor) {
  return p.dtensors != nullptr && p.dtensors[tensor].data != nullptr;
}

bool takes_turns(const BackwardParams &p) {
  return p.forward.deterministic != 0 && p.dq.data != nullptr;
}

void plan_gradients(const BackwardParams &p, BackwardFunctionPlan &plan) {
  const flashspark_function &function = p.forward.score_mod;
  ClearArguments &a = plan.clear_arguments;
  int64_t elements = 0;
  for (int32_t n = 0; function.mod != nullptr && n < function.num_tensors; ++n) {
    if (!is_wanted(p, n)) continue;
    const flashspark_captured_tensor &tensor = function.tensors[n];
    CapturedGradient &gradient = plan.gradients[n];
    gradient.data = p.dtensors[n].data;
    std::copy_n(p.dtensors[n].strides, tensor.rank, gradient.strides);
    ClearArguments::Tensor &clear = a.tensors[a.num_tensors++];
    clear = {gradient, {}, tensor.rank, 1};
    for (int32_t d = 0; d < tensor.rank; ++d) {
      clear.shape[d] = static_cast<int32_t>(tensor.shape[d]);
      clear.elements *= tensor.shape[d];
    }
    elements = std::max(elements, clear.elements);
    plan.wanted |= uint32_t{1} << n;
  }
  if (elements == 0) return;
  const OperationTraits &traits = traits_of(Operation::attention_backward_clear);
  constexpr int64_t kElementsOfThread = 8, kMostCtas = 1 << 16;
  const int64_t ctas = std::min(ceil_div(elements, traits.threads * kElementsOfThread), kMostCtas);
  a.num_ctas = static_cast<int32_t>(ctas);
  plan.clear = {{static_cast<uint32_t>(ctas), 1, 1}, traits.threads, 0};
}

// Of a call with lists.
struct TableSize {
  int64_t batch, heads, query_blocks, key_blocks;
  int64_t lists() const { return batch * heads; }
  int64_t bytes() const { return lists() * query_blocks * key_blocks; }
};
TableSize table_size(const Params &p) {
  return {p.block_batch > 1 ? p.num_seqs : 1, p.block_heads > 1 ? p.num_heads_q : 1,
          std::max<int64_t>(1, ceil_div(p.max_seqlen_q, p.block_size_q)), key_blocks(p)};
}

void plan_blocks(const Params &p, BackwardFunctionPlan &plan) {
  const auto divisor = [](int64_t x) { return make_divisor(static_cast<uint32_t>(std::min(x, kMaxTokens))); };
  const TableSize size = table_size(p);
  BlockStatusArguments &a = plan.block_arguments;
  a.lists[0] = block_list_of(p, p.masked_blocks);
  a.lists[1] = block_list_of(p, p.full_blocks);
  a.heads = divisor(size.heads);
  BlockStatusTable &table = a.table;
  table.query_blocks = static_cast<int32_t>(size.query_blocks);
  table.key_blocks = static_cast<int32_t>(size.key_blocks);
  const int64_t of_list = size.query_blocks * size.key_blocks;
  table.head_stride = size.heads > 1 ? of_list : 0;
  table.batch_stride = size.batch > 1 ? size.heads * of_list : 0;
  table.block_tokens = divisor(p.block_size_q);
  table.block_keys = divisor(p.block_size_k);
  constexpr int64_t kAlignment = 16;
  plan.bytes = static_cast<size_t>(ceil_div(size.bytes(), kAlignment) * kAlignment);
  plan.block_sparse = true;
  plan.make_blocks = {{static_cast<uint32_t>(size.lists() * size.query_blocks), 1, 1},
                      traits_of(Operation::attention_backward_blocks).threads,
                      0};
}

struct FunctionKernelKey {
  SourceKey source;
  KernelKey kernel;
  bool block_sparse, in_turns, native;
  int device;

  auto tied() const {
    return std::tuple(source, kernel.backward, kernel.dtype, block_sparse, in_turns, native, device);
  }
  bool operator<(const FunctionKernelKey &other) const { return tied() < other.tied(); }
};

}  // namespace

bool takes_backward_functions(const Params &p) {
  return has_functions(p) || has_block_lists(p);
}

bool fits_functions(const BackwardInstance &instance, const BackwardTile &tile, const BackwardParams &params) {
  const Params &p = params.forward;
  if (instance.score_mod == ScoreMod::native) return true;
  if (takes_turns(params)) return false;
  for (int32_t n = 0; p.score_mod.mod != nullptr && n < p.score_mod.num_tensors; ++n) {
    if (is_wanted(params, n)) return false;
  }
  // A warp's keys lie in one of the user's blocks.
  if (has_block_lists(p) && p.block_size_k % tile.warp_keys != 0) return false;
  return plan_backward_functions(params, instance, tile).shared_bytes <= kMaxSharedBytes;
}

FunctionBackwardArguments BackwardFunctionPlan::with(const BackwardArguments &arguments) const {
  FunctionBackwardArguments a{arguments, functions, {}, block_arguments.table};
  std::copy(std::begin(gradients), std::end(gradients), a.gradients);
  return a;
}

void BackwardFunctionPlan::bind(void *memory) {
  block_arguments.table.data = block_sparse ? static_cast<uint8_t *>(memory) : nullptr;
}

BackwardFunctionPlan plan_backward_functions(const BackwardParams &params, const BackwardInstance &instance,
                                             const BackwardTile &tile) {
  const Params &p = params.forward;
  BackwardFunctionPlan plan;
  add_functions(p, plan.functions);
  plan.wide_positions = has_wide_positions(p.max_seqlen_q, p.max_seqlen_k);
  plan.in_turns = takes_turns(params);
  plan.native = has_built_in_biases_or_masks(p);  // softcap is in every kernel that may have it
  plan.hands_on = instance.score_mod == ScoreMod::none;
  plan_gradients(params, plan);
  if (has_block_lists(p)) plan_blocks(p, plan);
  const int32_t words = source_of(p, plan).row_words;
  plan.shared_bytes = static_cast<uint32_t>(function_backward_memory(instance, tile, words).total);
  return plan;
}

std::string to_string(const BackwardFunctionPlan &plan) {
  std::string text;
  if (plan.clear.grid[0] > 0) text += to_string({Operation::attention_backward_clear}, plan.clear) + "\n";
  if (plan.make_blocks.grid[0] > 0) text += to_string({Operation::attention_backward_blocks}, plan.make_blocks) + "\n";
  return text;
}

CompileRequest backward_function_request(const Params &p, const BackwardFunctionPlan &plan, const KernelKey &kernel,
                                         Architecture arch) {
  CompileRequest request;
  request.entry = "flashspark_attention_backward_functions";
  request.architecture = architecture_name(arch);
  request.source = "#include \"backward/function.cu\"\n";
  request.headers = {{"user_functions.cuh", source_of(p, plan).text}};
  request.macros = {std::string("FLASHSPARK_NAME=") + kernel.instance_name(),
                    std::string("FLASHSPARK_BLOCK_SPARSE=") + (plan.block_sparse ? "1" : "0"),
                    std::string("FLASHSPARK_IN_TURNS=") + (plan.in_turns ? "1" : "0"),
                    std::string("FLASHSPARK_NATIVE=") + (plan.native ? "1" : "0"),
                    "FLASHSPARK_USER_FUNCTIONS=\"user_functions.cuh\"",
                    std::string("FLASHSPARK_ELEMENT=") + (kernel.dtype == KernelDType::bf16 ? "Bfloat16" : "Float16")};
  // As the forward kernel computes it.
  if (kernel.dtype == KernelDType::bf16) request.macros.emplace_back("FLASHSPARK_FAST_TANH");
  return request;
}

Kernel get_backward_function_kernel(const Params &p, const BackwardFunctionPlan &plan, const KernelKey &kernel,
                                    int index) {
  const DeviceFacts &device = device_facts(index);
  if (plan.shared_bytes > device.shared_bytes_per_block) {
    throw Error(FLASHSPARK_UNSUPPORTED, "kernel " + kernel.name() + " with these functions needs " +
                                            std::to_string(plan.shared_bytes) + " bytes of shared memory, " +
                                            device.name + " has " + std::to_string(device.shared_bytes_per_block));
  }
  static auto *kernels = new LoadedKernels<FunctionKernelKey>;
  return kernels->get({source_key(p, plan), kernel, plan.block_sparse, plan.in_turns, plan.native, index}, index,
                      plan.shared_bytes,
                      [&] { return backward_function_request(p, plan, kernel, device.machine.arch); });
}

std::string unsupported_backward_functions(const BackwardParams &params) {
  const Params &p = params.forward;
  if (!takes_backward_functions(p)) return {};
  std::string text;
  const auto add = [&](const std::string &what) { text += (text.empty() ? "" : "; ") + what; };
  for (int32_t n = 0; p.deterministic != 0 && p.score_mod.mod != nullptr && n < p.score_mod.num_tensors; ++n) {
    if (is_wanted(params, n))
      add("deterministic with dtensors[" + std::to_string(n) + "], which is summed in no order");
  }
  if (has_block_lists(p) && table_size(p).bytes() > kMaxScratchBytes) {
    add("block lists of " + std::to_string(table_size(p).bytes()) +
        " pairs of blocks, which would take more than 1 GiB; larger blocks take less");
  }
  return text;
}

}  // namespace flashspark::cuda
