#include "cuda/backward_functions.hpp"

#include <algorithm>
#include <bit>
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

Launch elementwise(Operation operation, int64_t elements) {
  const uint32_t threads = traits_of(operation).threads;
  constexpr int64_t kElementsOfThread = 8, kMostCtas = 1 << 16;
  const int64_t ctas = std::min(ceil_div(elements, threads * kElementsOfThread), kMostCtas);
  return {{static_cast<uint32_t>(ctas), 1, 1}, threads, 0};
}

// Floats that the numbers of so many exact sums take which are not finite: words behind them are aligned.
int64_t special_floats(int64_t count) {
  return ceil_div(count, 4) * 4;
}

int64_t captured_elements(const ClearArguments &a) {
  int64_t all = 0;
  for (int32_t n = 0; n < a.num_tensors; ++n) all += a.tensors[n].elements;
  return all;
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
  if (p.forward.deterministic != 0) {
    constexpr int64_t kBytes = sizeof(float) + kExactWords * sizeof(uint64_t), kMost = kMaxExactSumBytes / kBytes;
    static_cast<ClearArguments &>(plan.round_arguments) = a;
    plan.cut_into(ceil_div(captured_elements(a), kMost));
    return;
  }
  plan.clear = elementwise(Operation::attention_backward_clear, elements);
  a.num_ctas = static_cast<int32_t>(plan.clear.grid[0]);
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
  plan.block_bytes = static_cast<size_t>(ceil_div(size.bytes(), kAlignment) * kAlignment);
  plan.bytes += plan.block_bytes;
  plan.block_sparse = true;
  plan.make_blocks = {{static_cast<uint32_t>(size.lists() * size.query_blocks), 1, 1},
                      traits_of(Operation::attention_backward_blocks).threads,
                      0};
}

struct FunctionKernelKey {
  SourceKey source;
  KernelKey kernel;
  bool block_sparse, in_turns, native, exact_sums;
  int device;

  auto tied() const {
    return std::tuple(source, kernel.backward, kernel.dtype, block_sparse, in_turns, native, exact_sums, device);
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
  FunctionBackwardArguments a{arguments, functions, {}, block_arguments.table, round_arguments.sums};
  std::copy(std::begin(gradients), std::end(gradients), a.gradients);
  return a;
}

FunctionBackwardArguments BackwardFunctionPlan::for_sums_alone(const BackwardArguments &arguments) const {
  FunctionBackwardArguments a = with(arguments);
  a.dq_sum = a.dk_sum = a.dv_sum = nullptr;
  a.dq = a.dk = a.dv = nullptr;
  a.dq_turns = nullptr;
  a.drel_logits = a.dalibi_slopes = nullptr;
  return a;
}

void BackwardFunctionPlan::bind(void *memory) {
  block_arguments.table.data = block_sparse ? static_cast<uint8_t *>(memory) : nullptr;
  if (!sums_exactly()) return;
  ExactSums &sums = round_arguments.sums;
  sums.special = reinterpret_cast<float *>(static_cast<char *>(memory) + block_bytes);
  sums.words = reinterpret_cast<uint64_t *>(sums.special + special_floats(sums.count));
  clear_arguments.tensors[0].gradient.data = sums.special;
  begin_pass(0);
}

// The sums are cleared as a tensor of floats.
void BackwardFunctionPlan::cut_into(int64_t number_of_passes) {
  RoundArguments &a = round_arguments;
  passes = number_of_passes;
  a.sums.count = ceil_div(captured_elements(a), passes);
  round = elementwise(Operation::attention_backward_round, a.sums.count);
  a.num_ctas = static_cast<int32_t>(round.grid[0]);
  const int64_t floats = special_floats(a.sums.count) + a.sums.count * (kExactWords * 2);
  bytes = block_bytes + static_cast<size_t>(floats) * sizeof(float);
  clear = elementwise(Operation::attention_backward_clear, floats);
  clear_arguments = {
      {{{nullptr, {1}}, {static_cast<int32_t>(floats)}, 1, floats}}, 1, static_cast<int32_t>(clear.grid[0])};
}

void BackwardFunctionPlan::begin_pass(int64_t number) {
  RoundArguments &a = round_arguments;
  a.first = number * a.sums.count;
  int64_t at = -a.first;  // of a tensor's first element, in the sums
  for (int32_t n = 0, of_round = 0; n < kMaxCapturedTensors; ++n) {
    if ((wanted >> n & 1) == 0) continue;
    const ClearArguments::Tensor &tensor = a.tensors[of_round++];
    // Elements of other passes are outside scratch memory, where nothing is added.
    gradients[n].data = std::bit_cast<float *>(std::bit_cast<uintptr_t>(a.sums.special) +
                                               static_cast<uintptr_t>(at * int64_t{sizeof(float)}));
    int64_t stride = 1;
    for (int32_t d = tensor.rank; d-- > 0; stride *= tensor.shape[d]) gradients[n].strides[d] = stride;
    at += tensor.elements;
  }
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

std::string text_behind(const BackwardFunctionPlan &plan) {
  if (!plan.sums_exactly()) return {};
  return to_string({Operation::attention_backward_round}, plan.round) +
         (plan.passes > 1 ? "; with clear and the main kernel, in " + std::to_string(plan.passes) + " passes" : "") +
         "\n";
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
                    std::string("FLASHSPARK_EXACT_SUMS=") + (plan.sums_exactly() ? "1" : "0"),
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
  return kernels->get(
      {source_key(p, plan), kernel, plan.block_sparse, plan.in_turns, plan.native, plan.sums_exactly(), index}, index,
      plan.shared_bytes, [&] { return backward_function_request(p, plan, kernel, device.machine.arch); });
}

std::string unsupported_backward_functions(const BackwardParams &params) {
  const Params &p = params.forward;
  if (!takes_backward_functions(p)) return {};
  std::string text;
  const auto add = [&](const std::string &what) { text += (text.empty() ? "" : "; ") + what; };
  if (has_block_lists(p) && table_size(p).bytes() > kMaxScratchBytes) {
    add("block lists of " + std::to_string(table_size(p).bytes()) +
        " pairs of blocks, which would take more than 1 GiB; larger blocks take less");
  }
  return text;
}

}  // namespace flashspark::cuda
