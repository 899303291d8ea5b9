// The choice of a kernel.
#include <algorithm>

#include "cuda/heuristics.hpp"
#include "cuda/planner.hpp"

namespace flashspark::cuda {
namespace {

#if defined(FLASHSPARK_TILES_SM120F)
constexpr bool kTilesOfSm120f = true;
#else
constexpr bool kTilesOfSm120f = false;
#endif
constexpr int32_t kSharedBytesPerSmOfSm120f = 100 << 10;

constexpr int32_t widest_value() {
  int32_t widest = 0;
  for (const Instance &instance : kInstances) widest = std::max(widest, instance.head_dim_v);
  return widest;
}

// The narrowest instance for the problem; NULL: none is wide enough.
const Instance *find(const Shape &shape, Tiling tiling, ScoreMod score_mod = ScoreMod::none) {
  for (const Instance &instance : kInstances) {
    if (instance.tiling != tiling || instance.score_mod != score_mod || instance.head_dim < shape.head_dim) continue;
    // A wider value takes several CTAs, each with scores of its own: an instance that holds it in one does less work.
    if (instance.head_dim_v < shape.head_dim_v && instance.head_dim_v < widest_value()) continue;
    return &instance;
  }
  return nullptr;
}

int64_t ctas_per_sm(int64_t shared_bytes_of_cta, const Tile &tile, int64_t shared_bytes_per_sm) {
  const int64_t by_memory = shared_bytes_per_sm / (shared_bytes_of_cta + kReservedSharedBytes);
  return std::clamp<int64_t>(by_memory, 1, std::max<int64_t>(tile.min_ctas, 1));
}

double cost_of_row(const Tile &tile, const Heuristics &h) {
  return (tile.warp_rows == 16 ? h.cost_of_16_row_warps : 1.0) * (tile.key_groups > 1 ? h.cost_of_key_groups : 1.0) *
         (tile.rows() <= 32 ? h.cost_of_small_ctas : 1.0);
}

// What a choice costs, in rows times keys that a whole SM computes: the larger of one CTA's cost, which has a part of
// an SM, and of all CTAs' cost over all SMs.
double cost_of(const Shape &shape, const Config &config, const Machine &machine) {
  const Tile &tile = *config.tile;
  const auto splits = static_cast<double>(choose_splits(shape, config, machine));
  const int64_t visible = shape.visible_keys(ceil_div(tile.rows(), shape.group));
  const auto keys = static_cast<double>(std::max<int64_t>(1, visible));
  const bool triangle = shape.causal && shape.window_left < 0;
  const auto diagonal = static_cast<double>(std::min(shape.max_seqlen_q, shape.max_seqlen_k));
  const double kept = triangle ? 1 - diagonal / 2 / keys : 1;
  const auto ctas = static_cast<double>(shape.num_m_blocks(tile.rows()) * shape.grid_heads * config.value_ctas);
  const auto resident = static_cast<double>(config.ctas_per_sm);
  return tile.rows() * keys * cost_of_row(tile, heuristics_of(machine.arch)) *
         std::max(resident / splits, ctas * kept / machine.sm_count);
}

}  // namespace

Architecture tiles_of(const Machine &machine) {
  return kTilesOfSm120f ? Architecture::sm_120f : machine.arch;
}

Config config_of(const Shape &shape, const Instance &instance, const Machine &machine) {
  const Tile &tile = instance.tile(tiles_of(machine));
  int64_t shared = shared_bytes(instance, tile, shape.dequantizes_kv) + function_row_bytes(tile, shape.function_words);
  const int64_t resident = ctas_per_sm(shared, tile, machine.shared_bytes_per_sm);
  if (kTilesOfSm120f) {
    // As many CTAs an SM as an SM12x holds, by shared memory that nobody uses.
    const int64_t wanted = ctas_per_sm(shared, tile, kSharedBytesPerSmOfSm120f);
    shared = std::max(shared, machine.shared_bytes_per_sm / (wanted + 1));
  }
  return {.instance = &instance,
          .tile = &tile,
          .stream_k = uses_stream_k(shape, instance, machine),
          .value_ctas = ceil_div(shape.head_dim_v, instance.head_dim_v),
          .ctas_per_sm = resident,
          .slots = resident * machine.sm_count,
          .shared_bytes = static_cast<uint32_t>(shared)};
}

namespace {
// The tilings for few rows where their Stream-K pays, which is where they are measured (E64); else many rows a CTA.
Config choose_config_with_score_mod(const Shape &shape, const Machine &machine) {
  const Instance &prefill = *find(shape, Tiling::prefill, ScoreMod::native);
  for (const Tiling tiling : {Tiling::decode, Tiling::short_q}) {
    const Instance *few_rows = find(shape, tiling, ScoreMod::native);
    if (few_rows == nullptr || few_rows->head_dim != prefill.head_dim) continue;
    if (tiling == Tiling::decode && shape.rows > few_rows->tile(tiles_of(machine)).rows()) continue;
    if (const Config config = config_of(shape, *few_rows, machine); config.stream_k) return config;
  }
  return config_of(shape, prefill, machine);
}
}  // namespace

namespace {
Config choose_config_without_lists(const Shape &shape, const Machine &machine) {
  const auto with = [&](const Instance &instance) { return config_of(shape, instance, machine); };
  if (shape.needs_score_mod) return choose_config_with_score_mod(shape, machine);
  const Instance &short_q = *find(shape, Tiling::short_q);
  const Instance *prefill = find(shape, Tiling::prefill);
  if (prefill == nullptr || prefill->head_dim > short_q.head_dim) return with(short_q);
  // Another kernel adds up in another order: nothing about the rest of a batch may choose it.
  if (shape.deterministic) return with(*prefill);
  const Instance *decode = find(shape, Tiling::decode);
  const Architecture arch = tiles_of(machine);
  if (decode != nullptr && decode->head_dim == short_q.head_dim && shape.rows <= decode->tile(arch).rows())
    return with(*decode);
  const Config few_rows = with(short_q);
  if (few_rows.stream_k || shape.rows <= few_rows.tile->rows()) return few_rows;
  const Config many_rows = with(*prefill);
  return cost_of(shape, many_rows, machine) < cost_of(shape, few_rows, machine) ? many_rows : few_rows;
}
}  // namespace

Config choose_config(const Shape &shape, const Machine &machine) {
  const Config usual = choose_config_without_lists(shape, machine);
  if (fits_blocks(shape, *usual.tile)) return usual;
  // Smaller blocks than the usual row or key tile: another tiling may fit them, and needs no launch that derives lists.
  // Not one for a few rows, of which many rows take so many CTAs that copying K and V is all they do, nor the reverse.
  if (usual.instance->tiling == Tiling::decode) return usual;
  for (const Tiling tiling : {Tiling::prefill, Tiling::short_q}) {
    const Instance *other = find(shape, tiling, usual.instance->score_mod);
    if (other != nullptr && fits_blocks(shape, other->tile(tiles_of(machine))))
      return config_of(shape, *other, machine);
  }
  return usual;
}

}  // namespace flashspark::cuda
