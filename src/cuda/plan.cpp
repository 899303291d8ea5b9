#include "cuda/plan.hpp"

#include "cuda/arguments.hpp"
#include "cuda/planner.hpp"

namespace flashspark::cuda {
namespace {

void set_forward(const Shape &shape, const Config &config, const Grid &grid, Plan &plan) {
  ForwardArguments &a = plan.arguments;
  a.num_m_blocks = static_cast<int32_t>(grid.num_m_blocks);
  a.num_heads_times_batch = static_cast<int32_t>(grid.num_heads_times_batch);
  a.l2_section_heads = static_cast<int32_t>(grid.l2_section_heads);
  a.num_splits = static_cast<int32_t>(grid.num_splits);
  a.stream_k = grid.stream_k;
  a.key_groups = grid.key_groups;
  if (grid.is_split()) {
    a.tile_rows = grid.tile_rows;
    a.tile_keys = config.tile->keys;
    a.partial_columns = static_cast<int32_t>(shape.partial_columns);
    a.partial_pair_distance = shape.dequantizes_kv ? 2 : 8;
  }
  plan.forward = {.grid = {static_cast<uint32_t>(grid.ctas()), static_cast<uint32_t>(grid.num_splits),
                           static_cast<uint32_t>(config.value_ctas)},
                  .threads = static_cast<uint32_t>(config.tile->threads()),
                  .shared_bytes = config.shared_bytes};
}

void set_metadata(const Params &p, Plan &plan) {
  ForwardArguments &a = plan.arguments;
  a.metadata_fingerprint = metadata_fingerprint(a);
  const int64_t size = plan.schedule_size();
  if (size > 0 && p.scheduler_metadata_size >= size) a.scheduler_metadata = p.scheduler_metadata;
}

void set_scratch(const Grid &grid, Plan &plan) {
  // A Stream-K range begins at most one split row tile, and goes on with another range's.
  plan.partial_slots = grid.stream_k.ctas > 0 ? 2 * grid.ctas() : grid.ctas() * grid.num_splits;
  plan.workspace += plan.partial_bytes();
}

void set_combine(const CombineGrid &grid, Plan &plan) {
  constexpr OperationTraits kCombine = traits_of(Operation::attention_forward_combine);
  plan.combine_row_tiles = static_cast<int32_t>(grid.row_tiles);
  plan.combine = {.grid = {static_cast<uint32_t>(grid.x), static_cast<uint32_t>(grid.y), static_cast<uint32_t>(grid.z)},
                  .threads = kCombine.threads,
                  .shared_bytes = kCombine.shared_bytes};
}

}  // namespace

void Plan::bind(void *memory) {
  if (partial_slots > 0) {
    arguments.partial_out = static_cast<float *>(memory);
    arguments.partial_lse =
        arguments.partial_out + partial_slots * arguments.tile_rows * int64_t{arguments.partial_columns};
  }
  if (functions && functions->block_tiles) {
    functions->block_tiles->bind(static_cast<char *>(memory) + partial_bytes());
    functions->arguments.blocks = functions->block_tiles->lists;
  }
}

size_t Plan::partial_bytes() const {
  const int64_t rows = partial_slots * arguments.tile_rows;
  return sizeof(float) * static_cast<size_t>(rows * (arguments.partial_columns + 1));
}

const BlockTilePlan *Plan::block_tiles() const {
  return functions && functions->block_tiles ? &*functions->block_tiles : nullptr;
}

Launch Plan::block_tiles_launch() const {
  const BlockTilePlan *tiles = block_tiles();
  if (tiles == nullptr) return {};
  return {{static_cast<uint32_t>(tiles->row_tiles), 1, 1}, traits_of(Operation::attention_block_tiles).threads, 0};
}

CombineArguments Plan::combine_arguments() const {
  return {arguments, arguments, arguments, static_cast<int32_t>(combine.grid[1]), combine_row_tiles};
}

ScheduleArguments Plan::schedule_arguments() const {
  return {arguments, arguments};
}

int64_t Plan::schedule_size() const {
  const bool by_lengths = arguments.prefix_mode == PrefixMode::none && arguments.rswa_window == 0;
  return arguments.stream_k.ctas > 0 && by_lengths ? int64_t{forward.grid[0]} * kRecordWords : 0;
}

bool fits(const Instance &instance, const Params &p) {
  return instance.head_dim >= p.head_dim && (instance.score_mod == ScoreMod::native || !shape_of(p).needs_score_mod);
}

Plan make_plan(const Params &p, const Machine &machine, const Instance *instance) {
  Plan plan;
  const Shape shape = shape_of(p);
  if (shape.is_empty()) return plan;
  const Config config = instance != nullptr ? config_of(shape, *instance, machine) : choose_config(shape, machine);
  const Grid grid = choose_grid(shape, config, machine);
  plan.instance = config.instance;
  plan.tile = config.tile;
  plan.out_dtype = p.out.dtype == FLASHSPARK_BFLOAT16 ? KernelDType::bf16 : KernelDType::fp16;
  plan.dtype = shape.dequantizes_kv ? KernelDType::e4m3 : plan.out_dtype;
  plan.arguments = arguments_of(p, shape, config.instance->score_mod);
  if (shape.has_functions) plan.functions = plan_functions(p, shape, *config.instance, *config.tile);
  if (const BlockTilePlan *tiles = plan.block_tiles()) plan.workspace = tiles->bytes;
  set_forward(shape, config, grid, plan);
  if (!grid.is_split()) return plan;
  if (config.stream_k) set_metadata(p, plan);
  set_scratch(grid, plan);
  set_combine(combine_grid(shape, grid, machine), plan);
  return plan;
}

}  // namespace flashspark::cuda
