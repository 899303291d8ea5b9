// Plans as text: what explain prints.
#include <ostream>

#include "cuda/plan.hpp"

namespace flashspark::cuda {
namespace {

std::string forward_text(const Plan &plan) {
  const ForwardArguments &a = plan.arguments;
  const int32_t tile_rows = a.tile_rows != 0 ? a.tile_rows : plan.tile->rows();
  std::string text = to_string(plan.forward_key(), plan.forward) + (plan.functions ? ", compiled at run time" : "") +
                     (plan.functions && plan.functions->block_sparse ? ", over block lists" : "") +
                     (plan.block_tiles() != nullptr ? " of its tiles" : "") +
                     (plan.functions && plan.functions->dropout ? ", with dropout" : "") + ", tile " +
                     std::to_string(tile_rows) + " x " + std::to_string(plan.tile->keys);
  if (a.stream_k.ctas > 0) {
    text += ", Stream-K over " + std::to_string(a.stream_k.ctas) + " CTAs";
    if (a.stream_k.small_problem_tiles > 0) {
      text += " (" + std::to_string(a.stream_k.small_problem_ctas) + " below " +
              std::to_string(a.stream_k.small_problem_tiles) + " key tiles)";
    }
    if (a.scheduler_metadata != nullptr) text += ", with scheduler metadata";
  } else {
    text += ", " + std::to_string(a.num_splits) + (a.num_splits == 1 ? " split" : " splits");
  }
  return text + "\n";
}

}  // namespace

std::string to_string(const KernelKey &kernel, const Launch &launch) {
  return kernel.name() + ": grid " + std::to_string(launch.grid[0]) + " x " + std::to_string(launch.grid[1]) + " x " +
         std::to_string(launch.grid[2]) + ", " + std::to_string(launch.threads) + " threads, " +
         std::to_string(launch.shared_bytes) + " bytes of shared memory";
}

std::string to_string(const Plan &plan) {
  if (plan.instance == nullptr) return {};
  std::string text;
  if (const BlockTilePlan *tiles = plan.block_tiles()) {
    text += to_string({Operation::attention_block_tiles}, plan.block_tiles_launch()) +
            "\nscratch memory: " + std::to_string(tiles->bytes) + " bytes, lists of its tiles from those of blocks\n";
  }
  text += forward_text(plan);
  if (plan.partial_slots > 0) {
    text += "scratch memory: " + std::to_string(plan.partial_bytes()) + " bytes, " +
            std::to_string(plan.partial_slots) + " partial results of " + std::to_string(plan.arguments.tile_rows) +
            " x " + std::to_string(plan.arguments.partial_columns) + "\n";
  }
  if (plan.combine.grid[0] > 0) text += to_string(plan.combine_key(), plan.combine) + "\n";
  return text;
}

std::ostream &operator<<(std::ostream &out, const Plan &plan) {
  return out << to_string(plan);
}

}  // namespace flashspark::cuda
