#include "cuda/plan.hpp"

#include <algorithm>

#include "cuda/arguments.hpp"

namespace flashspark::cuda {
namespace {

#if defined(FLASHSPARK_TILES_SM120F)
constexpr bool kTilesOfSm120f = true;
#else
constexpr bool kTilesOfSm120f = false;
#endif

// Keys below which a piece of a split problem does not pay, and of the whole below which splitting does not: the second
// launch costs about what 512 keys cost a block without key groups.
constexpr int64_t kMinSplitKeys = 512;
constexpr int64_t kMaxSplits = 128;
// Scratch memory above which a caller's own number of splits is taken for a mistake and cut: a dense batch of 155
// prompts and 7 splits would ask for 72 GiB. The combine kernel counts on offsets of 32 bits.
constexpr int64_t kMaxScratchBytes = int64_t{1} << 30;

// Rows of a share's row tile that one block of the combine kernel joins at most, eight at a time: with a block for
// every eight 64/8 B8 2k q=8 launched 2112 blocks and took 48.7 us instead of 39 (H100).
constexpr int64_t kMaxCombineRows = 32;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

bool needs_score_mod(const Params &p) {
  return p.softcap > 0 || p.rel_logits != nullptr || p.alibi_slopes != nullptr || p.rswa_window > 0 ||
         p.prefix_mode != FLASHSPARK_PREFIX_NONE || p.attention_chunk > 0 ||
         (is_paged(p) && p.page_size % kGroupRows != 0);
}

const Instance *find(const Params &p, Tiling tiling, ScoreMod score_mod = ScoreMod::none) {
  for (const Instance &instance : kInstances) {
    if (instance.tiling == tiling && instance.score_mod == score_mod && instance.head_dim >= p.head_dim) {
      // A value wider than the instance's is computed in several blocks, each of which computes the scores anew: where
      // the next width holds it in one, that is less work.
      const bool narrow = instance.head_dim_v < p.head_dim_v;
      const bool wider_follows = instance.head_dim < 256;
      if (!narrow || !wider_follows) return &instance;
    }
  }
  return nullptr;
}

Architecture tiles_of(const Machine &machine) {
  return kTilesOfSm120f ? Architecture::sm_120f : machine.arch;
}

// Blocks an SM holds of a tile.
int64_t residency(const Params &p, const Instance &instance, const Tile &tile, const Machine &machine) {
  constexpr int64_t kReserved = 1024;  // bytes of shared memory that the driver takes a block
  const int64_t by_memory = machine.shared_bytes_per_sm / (shared_bytes(instance, tile, dequantizes_kv(p)) + kReserved);
  return std::max<int64_t>(1, std::min<int64_t>(by_memory, tile.min_ctas));
}

int64_t value_tiles(const Params &p, const Instance &instance) {
  return ceil_div(p.head_dim_v, instance.head_dim_v);
}

// Of the whole grid before keys are split.
int64_t blocks_of(const Params &p, const Sizes &sizes, const Instance &instance, const Tile &tile) {
  return tiles_per_unit(p, sizes, tile.rows()) * sizes.units * value_tiles(p, instance);
}

// The longest stretch of keys that one row tile can visit.
int64_t visible_keys(const Params &p, int64_t tile_tokens) {
  if (p.prefix_mode != FLASHSPARK_PREFIX_NONE) return p.max_seqlen_k;
  const int64_t chunk = p.attention_chunk > 0 ? std::min(p.attention_chunk, kMaxTokens) + tile_tokens : kMaxTokens;
  const int64_t keys = std::min(p.max_seqlen_k, chunk);
  if (p.window_left < 0 || (p.window_right < 0 && p.causal == 0)) return keys;
  const int64_t right = p.causal != 0 ? 0 : p.window_right;
  return std::min(keys, std::min(p.window_left, kMaxTokens) + right + tile_tokens);
}

// Short rows and long keys, whose lengths nobody knows here: blocks share the work evenly.
bool is_decode(const Params &p, const Sizes &sizes, const Instance &instance, const Machine &machine) {
  const Tile &tile = instance.tile(tiles_of(machine));
  if (!supports_stream_k(instance)) return false;
  if (p.num_splits != 0 || p.deterministic != 0) return false;
  constexpr int64_t kLongKeys = 8;  // times the rows: what is less is prefill, where masks cut tiles of rows apart
  if (p.max_seqlen_k < kLongKeys * p.max_seqlen_q) return false;
  // Several row tiles read the same keys, which pays while the L2 holds most of them: 32/2 D256 q=8 over 2k, four
  // tiles, 18.6 us instead of 23.6 and over 8k no gain; 64/8 D128 q=16 over 8k, two tiles, B1 28 instead of 31, B8 149
  // instead of 126 (H100).
  constexpr int64_t kMaxRowTiles = 8;
  const int64_t row_tiles = ceil_div(sizes.rows, tile.max_rows()), keys = visible_keys(p, sizes.rows);
  const int64_t bytes = p.num_seqs * p.num_heads_kv * kv_bytes(p, keys);
  if (row_tiles > kMaxRowTiles || (row_tiles > 1 && row_tiles * bytes > machine.l2_bytes * 3 / 2)) return false;
  // Positions have 32 bits, however long the device says that sequences are.
  const int64_t most_tiles = key_rows(p) / tile.keys + 1;
  return ceil_div(keys, tile.keys) > 1 && 2 * p.num_seqs * p.num_heads_kv * row_tiles * most_tiles <= kMaxTokens;
}

// Measured on H100 and H200, pages of 16.
StreamKLimits stream_k(const Sizes &sizes, const Instance &instance, int64_t slots, const Machine &machine) {
  const Tile &tile = instance.tile(tiles_of(machine));
  StreamKLimits limits{};
  limits.ctas = static_cast<int32_t>(slots);
  // Contributors of 64 keys, or of more where many rows of float are written and read again for each.
  const int64_t rows = std::min<int64_t>(sizes.rows, tile.max_rows());
  const int64_t times = std::max<int64_t>(1, rows / 32), least = ceil_div(64 * times, tile.keys);
  // Little work on one block an SM: pieces are fewer, and the combine kernel's blocks find room beside them.
  limits.small_problem_ctas = machine.sm_count;
  // Keys an SM; of narrow kernels 16/2 D128 B1 32k takes 19.2 us so and 20.3 with all blocks, 16/1 D256 21.6 and 24.6,
  // and 16/8 D64 8k, 500 keys an SM, 12.3 and 11.7 (H100).
  const int64_t few_keys =
      instance.tiling == Tiling::decode ? std::min(5 * instance.head_dim, 640) : std::min<int64_t>(4 * tile.keys, 256);
  const int64_t few_tiles = few_keys / tile.keys;
  limits.small_problem_tiles = static_cast<int32_t>(slots > machine.sm_count ? few_tiles * machine.sm_count : 0);
  while ((1 << limits.min_tiles_shift) < least) ++limits.min_tiles_shift;
  limits.tile_start_cost = 2;  // one long sequence among 63 short ones: 192 us without, 172 with 2 to 4
  return limits;
}

// Of all that a share depends on beside the lengths themselves: FNV-1a, by Fowler, Noll and Vo.
int32_t metadata_fingerprint(const ForwardArguments &a) {
  uint32_t key = 2166136261u;
  const auto add = [&key](int64_t value) { key = (key ^ static_cast<uint32_t>(value)) * 16777619u; };
  for (const int32_t n : {a.tile_rows, a.tile_keys, a.num_seqs, a.num_heads_kv, a.window_left, a.window_right,
                          a.stream_k.ctas, a.stream_k.min_tiles_shift, a.stream_k.small_problem_ctas,
                          a.stream_k.small_problem_tiles, a.stream_k.tile_start_cost})
    add(n);
  add(a.group.value);
  for (const int32_t *lengths :
       {a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_q, a.seqused_k, a.leftpad_k, a.kv_batch_index, a.causal_per_seq})
    add(lengths != nullptr);
  // Of bounds and modes what some sequence's own number does not take the place of.
  if (a.causal_per_seq == nullptr) add(a.causal);
  if (a.cu_seqlens_q == nullptr && a.seqused_q == nullptr) add(a.max_seqlen_q);
  if (a.cu_seqlens_k == nullptr && a.seqused_k == nullptr) add(a.max_seqlen_k);
  return static_cast<int32_t>(key);
}

// Columns of a piece in scratch memory.
int64_t partial_columns(const Params &p) {
  return ceil_div(p.head_dim_v, 16) * 16;
}

int64_t choose_splits(const Params &p, const Sizes &sizes, const Instance &instance, const Machine &machine) {
  const Tile &tile = instance.tile(tiles_of(machine));
  const int64_t keys = std::max<int64_t>(1, visible_keys(p, ceil_div(tile.rows(), sizes.group)));
  const int64_t most = ceil_div(keys, tile.keys);
  if (p.num_splits > 0) {
    const int64_t rows = tiles_per_unit(p, sizes, tile.rows()) * sizes.units * tile.rows();
    const int64_t held = kMaxScratchBytes / (rows * partial_columns(p) * static_cast<int64_t>(sizeof(float)));
    return std::max<int64_t>(1, std::min<int64_t>({p.num_splits, most, kMaxSplits, held}));
  }
  if (p.deterministic != 0) return 1;  // a sequence must not depend on its neighbours, whose number sets the splits
  const int64_t blocks = blocks_of(p, sizes, instance, tile);
  const int64_t slots = residency(p, instance, tile, machine) * machine.sm_count;
  if (blocks * 2 > slots || keys <= kMinSplitKeys * tile.key_groups) return 1;
  return std::clamp<int64_t>(slots / blocks, 1, std::min({kMaxSplits, most, ceil_div(keys, kMinSplitKeys)}));
}

// Measured on an H100 in full grids: warps of 16 rows, which read K and V for half as many rows as those of 32, are 15%
// slower a row, key groups, which compute what lies beyond the diagonal, another 20%, and blocks of 32 rows, each of
// which copies K and V, another 15%.
double slowness(const Tile &tile) {
  return (tile.warp_rows == 16 ? 1.15 : 1.0) * (tile.key_groups > 1 ? 1.2 : 1.0) * (tile.rows() <= 32 ? 1.15 : 1.0);
}

// What a choice costs, in rows times keys that an SM with all its blocks works on: the longest block, which shares its
// SM with others, or all of them over all SMs.
double cost(const Params &p, const Sizes &sizes, const Instance &instance, const Machine &machine) {
  const Tile &tile = instance.tile(tiles_of(machine));
  const auto splits = static_cast<double>(choose_splits(p, sizes, instance, machine));
  const auto keys = static_cast<double>(std::max<int64_t>(1, visible_keys(p, ceil_div(tile.rows(), sizes.group))));
  const bool triangle = p.causal != 0 && p.window_left < 0;
  const double kept = triangle ? 1 - static_cast<double>(std::min(p.max_seqlen_q, p.max_seqlen_k)) / 2 / keys : 1;
  const auto blocks = static_cast<double>(blocks_of(p, sizes, instance, tile));
  const auto resident = static_cast<double>(residency(p, instance, tile, machine));
  return tile.rows() * keys * slowness(tile) * std::max(resident / splits, blocks * kept / machine.sm_count);
}

const Instance &choose_instance(const Params &p, const Sizes &sizes, const Machine &machine) {
  if (needs_score_mod(p)) return *find(p, Tiling::prefill, ScoreMod::native);
  const Instance &few = *find(p, Tiling::short_q);
  const Instance *wide = find(p, Tiling::prefill);
  if (wide == nullptr || wide->head_dim > few.head_dim) return few;
  // Another kernel adds up in another order: nothing about the rest of a batch may choose it.
  if (p.deterministic != 0) return *wide;
  const Instance *narrow = find(p, Tiling::decode);
  if (narrow != nullptr && narrow->head_dim == few.head_dim && sizes.rows <= narrow->tile(tiles_of(machine)).rows())
    return *narrow;
  if (sizes.rows <= few.tile(tiles_of(machine)).rows() || is_decode(p, sizes, few, machine)) return few;
  return cost(p, sizes, *wide, machine) < cost(p, sizes, few, machine) ? *wide : few;
}

// Units that share the L2: their K and V fit in half of it, so that the tiles of a section find them there. At least
// one wave of blocks, or the sections themselves would leave SMs idle.
int64_t l2_section_heads(const Params &p, const Sizes &sizes, int64_t tiles, int64_t slots, const Machine &machine) {
  const int64_t fit = machine.l2_bytes / 2 / std::max<int64_t>(1, kv_bytes(p, p.max_seqlen_k));
  return std::clamp<int64_t>(std::max(fit, ceil_div(slots, std::max<int64_t>(1, tiles))), 1, sizes.units);
}

}  // namespace

int32_t max_key_rows(const Params &p, const ForwardArguments &a) {
  if (a.tile_rows == 0) return a.key_rows;
  const int64_t row_tiles = ceil_div(sizes_of(p).rows, a.tile_rows);
  const int64_t tiles = kMaxTokens / (2 * p.num_seqs * p.num_heads_kv * row_tiles) - 1;
  return static_cast<int32_t>(std::min(kMaxTokens, tiles * a.tile_keys));
}

int64_t tiles_per_unit(const Params &p, const Sizes &sizes, int64_t tile_rows) {
  const int64_t of_one = ceil_div(sizes.rows, tile_rows);
  if (!is_varlen_q(p)) return of_one;
  const int64_t of_all = sizes.tokens * sizes.group / tile_rows + p.num_seqs;
  return std::min(of_one * p.num_seqs, of_all);
}

bool fits(const Instance &instance, const Params &p) {
  return instance.head_dim >= p.head_dim && (instance.score_mod == ScoreMod::native || !needs_score_mod(p));
}

Plan make_plan(const Params &p, const Machine &machine, void *workspace, const Instance *instance) {
  Plan plan;
  const Sizes sizes = sizes_of(p);
  if (sizes.tokens == 0 || p.num_seqs == 0) return plan;
  plan.out_dtype = p.out.dtype == FLASHSPARK_BFLOAT16 ? KernelDType::bf16 : KernelDType::fp16;
  plan.dtype = dequantizes_kv(p) ? KernelDType::e4m3 : plan.out_dtype;
  plan.instance = instance != nullptr ? instance : &choose_instance(p, sizes, machine);
  const Tile &tile = plan.instance->tile(tiles_of(machine));
  const int64_t slots = residency(p, *plan.instance, tile, machine) * machine.sm_count;

  ForwardArguments &a = plan.arguments = arguments_of(p, sizes, plan.instance->score_mod);
  const bool shares = is_decode(p, sizes, *plan.instance, machine);
  const bool warps_split_rows = shares && tile.runtime_key_groups() && sizes.rows > tile.rows();
  a.key_groups = warps_split_rows ? 1 : tile.key_groups;
  // Shares have no place in an order of tiles and units: to what reads one they are so many tiles of one unit.
  // Blocks that compute parts of a wide value read the same keys, and have to be there at once: 8/1 D512 B32 8k takes
  // 230 us so and 300 with twice as many (H100).
  const int64_t share_slots = std::max<int64_t>(1, slots / value_tiles(p, *plan.instance));
  const int64_t tiles = shares ? share_slots : tiles_per_unit(p, sizes, tile.rows());
  a.num_m_blocks = static_cast<int32_t>(tiles);
  a.num_heads_times_batch = static_cast<int32_t>(shares ? 1 : sizes.units);
  a.l2_section_heads = static_cast<int32_t>(shares ? 1 : l2_section_heads(p, sizes, tiles, slots, machine));
  if (shares) a.stream_k = stream_k(sizes, *plan.instance, share_slots, machine);
  a.num_splits = static_cast<int32_t>(shares ? 1 : choose_splits(p, sizes, *plan.instance, machine));
  const int64_t blocks = tiles * a.num_heads_times_batch;
  plan.forward.grid[0] = static_cast<uint32_t>(blocks);
  plan.forward.grid[1] = static_cast<uint32_t>(a.num_splits);
  plan.forward.grid[2] = static_cast<uint32_t>(value_tiles(p, *plan.instance));
  plan.forward.threads = static_cast<uint32_t>(tile.threads());
  plan.forward.shared_bytes = static_cast<uint32_t>(shared_bytes(*plan.instance, tile, dequantizes_kv(p)));
  if (kTilesOfSm120f) {
    // As many blocks an SM as an SM12x SM of 100 KB would hold, by shared memory that nobody uses.
    const Machine sm120{Architecture::sm_120f, machine.sm_count, machine.l2_bytes, 100 * 1024};
    const int64_t share = machine.shared_bytes_per_sm / (residency(p, *plan.instance, tile, sm120) + 1);
    plan.forward.shared_bytes = static_cast<uint32_t>(std::max<int64_t>(plan.forward.shared_bytes, share));
  }
  if (a.num_splits == 1 && !shares) return plan;

  // A share begins one split tile at most, and goes on with another's.
  const int64_t places = shares ? 2 * blocks : blocks * a.num_splits;
  a.tile_rows = warps_split_rows ? tile.max_rows() : tile.rows();
  a.tile_keys = tile.keys;
  if (shares) {
    a.metadata_fingerprint = metadata_fingerprint(a);
    if (p.scheduler_metadata_size >= plan.schedule_size()) a.scheduler_metadata = p.scheduler_metadata;
  }
  const int64_t rows = std::min<int64_t>(a.tile_rows, sizes.rows);
  a.partial_columns = static_cast<int32_t>(partial_columns(p));
  a.partial_pair_distance = dequantizes_kv(p) ? 2 : 8;
  const size_t outs = static_cast<size_t>(places * a.tile_rows * a.partial_columns);
  plan.workspace = sizeof(float) * (outs + static_cast<size_t>(places * a.tile_rows));
  a.partial_out = static_cast<float *>(workspace);
  a.partial_lse = workspace == nullptr ? nullptr : a.partial_out + outs;

  // One block (of x) for each row tile that there may be, if all are cut into many pieces; or for each share, since
  // nobody here knows which of them meet in one row tile.
  const int64_t row_tiles = ceil_div(sizes.rows, a.tile_rows),
                row_tiles_of_all = row_tiles * p.num_seqs * p.num_heads_kv;
  const bool by_tile = shares && row_tiles_of_all * kCombinePartials <= blocks;
  const int64_t merge_z = ceil_div(p.head_dim_v, kCombineColumns);
  const int64_t merge_x = by_tile ? row_tiles_of_all : blocks;
  a.combine_tiles = static_cast<int32_t>(by_tile ? row_tiles : 0);
  if (shares && !by_tile) {
    a.combine_ctas_per_tile = static_cast<int32_t>(ceil_div(rows, kMaxCombineRows));
  } else {
    // Of y as many as have so many warps a row as its pieces keep busy, and as make one block an SM: where the others'
    // turn comes after those beside the forward kernel's, 16/1 D256 B8 2k takes 14.6 us instead of 11.9 (H100).
    const int64_t pieces = shares ? blocks / merge_x : a.num_splits;
    const int64_t most_warps = machine.sm_count * kCombineWarps / (merge_x * rows * merge_z);
    int64_t warps = 1;
    while (warps < std::min<int64_t>({kCombineWarps, most_warps, ceil_div(pieces, kCombinePartials)})) warps *= 2;
    a.combine_ctas_per_tile = static_cast<int32_t>(ceil_div(rows * warps, kCombineWarps));
  }
  plan.combine.grid[0] = static_cast<uint32_t>(merge_x);
  plan.combine.grid[1] = static_cast<uint32_t>(a.combine_ctas_per_tile);
  plan.combine.grid[2] = static_cast<uint32_t>(merge_z);
  plan.combine.threads = kCombineWarps * 32;
  plan.combine.shared_bytes = kCombineWarps * kCombineWarpBytes;
  return plan;
}

}  // namespace flashspark::cuda
