#include "cuda/block_mask.hpp"

#include <algorithm>
#include <compare>

#include "cuda/device.hpp"
#include "cuda/function_plan.hpp"
#include "cuda/launch.hpp"
#include "cuda/loaded_kernels.hpp"
#include "graph/cuda_source.hpp"
#include "mod.hpp"

namespace flashspark::cuda {
namespace {

struct BlockMaskKey {
  uint64_t mask;  // flashspark_mod::id
  int32_t lane_keys;
  bool wide_positions;
  int device;

  auto operator<=>(const BlockMaskKey &) const = default;
};

// As many as a block fills, so that few lanes look at a key twice.
int32_t lane_keys_of(int64_t block_size_k) {
  constexpr int64_t kWarp = 32;
  return block_size_k > 2 * kWarp ? 4 : block_size_k > kWarp ? 2 : 1;
}

}  // namespace

BlockMaskPlan make_block_mask_plan(const BlockMaskParams &p) {
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  BlockMaskPlan plan;
  BlockMaskArguments &a = plan.arguments;
  const AskedFor asked = asked_for(p);
  a.functions = mask_arguments(p.mask_mod);
  a.counts[0] = p.masked_counts, a.indices[0] = p.masked_indices;
  a.counts[1] = p.full_counts, a.indices[1] = p.full_indices;
  a.num_seqs = narrow(p.num_seqs), a.num_heads = narrow(p.num_heads);
  a.asked_seqs = narrow(asked.seqs), a.asked_heads = narrow(asked.heads);
  a.seqlen_q = narrow(p.seqlen_q), a.seqlen_k = narrow(p.seqlen_k);
  a.block_size_q = narrow(std::min(p.block_size_q, p.seqlen_q));
  a.block_size_k = narrow(std::min(p.block_size_k, p.seqlen_k));
  a.num_blocks_q = narrow(query_blocks(p)), a.num_blocks_k = narrow(key_blocks(p));
  a.ragged_q = p.seqlen_q % p.block_size_q != 0;
  a.ragged_k = p.seqlen_k % p.block_size_k != 0;
  plan.wide_positions = has_wide_positions(p.seqlen_q, p.seqlen_k);
  plan.lane_keys = lane_keys_of(a.block_size_k);
  plan.launch.grid[0] = static_cast<uint32_t>(asked.seqs * asked.heads * query_blocks(p));
  plan.launch.grid[1] = plan.launch.grid[2] = 1;
  plan.launch.threads = kBlockMaskThreads;
  plan.launch.shared_bytes = block_mask_shared_bytes(p.mask_mod.mod->row_words(plan.wide_positions));
  return plan;
}

CompileRequest block_mask_request(const BlockMaskParams &p, const BlockMaskPlan &plan, Architecture arch) {
  CompileRequest request;
  request.entry = "flashspark_block_mask";
  request.architecture = architecture_name(arch);
  request.source = "#include \"mask/block_mask.cu\"\n";
  request.headers = {
      {"user_functions.cuh",
       graph::cuda_source(nullptr, &p.mask_mod.mod->graph, {.wide_positions = plan.wide_positions}).text}};
  request.macros = {"FLASHSPARK_LANE_KEYS=" + std::to_string(plan.lane_keys),
                    "FLASHSPARK_USER_FUNCTIONS=\"user_functions.cuh\""};
  return request;
}

void create_block_mask(const BlockMaskParams &p) {
  static auto *kernels = new LoadedKernels<BlockMaskKey>;
  const BlockMaskPlan plan = make_block_mask_plan(p);
  const Architecture arch = device_facts(p.device_index).machine.arch;
  const CurrentDevice current(p.device_index);
  const BlockMaskKey key{p.mask_mod.mod->id, plan.lane_keys, plan.wide_positions, p.device_index};
  const Kernel kernel =
      kernels->get(key, p.device_index, plan.launch.shared_bytes, [&] { return block_mask_request(p, plan, arch); });
  launch(kernel, plan.launch, &plan.arguments, static_cast<Stream>(p.stream), arch);
}

}  // namespace flashspark::cuda
