// Plans the work of one problem: cuts the rows into tiles, the keys of long tiles into splits, and combines the splits.
#include "cpu/engine.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/functions.hpp"
#include "cpu/scratch_memory.hpp"
#include "cpu/thread_pool.hpp"
#include "cpu/tile.hpp"
#include "cpu/tile_mask.hpp"
#include "dtype.hpp"

namespace flashspark::cpu {
namespace {

// A shorter split costs more when it is combined than it gains.
constexpr int64_t kMinSplitKeys = 256;

// Below this many multiply-adds (some 10 us on one core) waking another thread costs more than it does.
constexpr int64_t kSerialWork = 400'000;

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// A tile of query rows, and into how many splits its keys are cut.
struct RowTile {
  int64_t b, h_kv, row0;
  int32_t rows, heads;
  int32_t splits;
  int64_t first_partial;  // index of its first partial result, -1 without splits
  int64_t keys;           // upper bound of the keys its rows keep, for the order and the cut

  int64_t cost() const { return rows * heads * keys; }
};

struct Job {
  int64_t row_tile;
  int32_t split;
};

struct Plan {
  std::vector<RowTile> row_tiles;
  std::vector<Job> jobs;
  std::vector<float> partial_o, partial_ml;
  Dropout dropout;
  int64_t partial_rows = 0;  // rows of the largest split tile
  int64_t work = 0;          // multiply-adds, about
};

void cut_into_row_tiles(const Params &p, Plan &plan) {
  const int64_t group = p.num_heads_q / p.num_heads_kv;
  TileMask &mask = thread_mask();
  for (int64_t b = 0; b < p.num_seqs; ++b) {
    const Sequence s = sequence(p, b);
    const int64_t packed = s.seqlen_q * group;
    if (packed == 0) continue;
    const int32_t rows = tile_rows(p.head_dim, p.head_dim_v, packed);
    for (int64_t row0 = 0; row0 < packed; row0 += rows) {
      RowTile row_tile{b, 0, row0, static_cast<int32_t>(std::min<int64_t>(rows, packed - row0)), 1, 1, -1, 0};
      const int32_t heads = tile_heads(p, row_tile.rows);
      for (row_tile.h_kv = 0; row_tile.h_kv < p.num_heads_kv; row_tile.h_kv += heads) {
        if (row_tile.h_kv == 0 || p.block_heads > 1) {
          mask.set_tokens(p, s, row_tile.h_kv, row0 / group, (row0 + row_tile.rows - 1) / group);
          row_tile.keys = mask.num_keys();
        }
        row_tile.heads = static_cast<int32_t>(std::min<int64_t>(heads, p.num_heads_kv - row_tile.h_kv));
        plan.work += row_tile.cost() * (p.head_dim + p.head_dim_v);
        plan.row_tiles.push_back(row_tile);
      }
    }
  }
}

// num_splits = 0: a tile that costs more than a quarter of what a thread has to do is cut. deterministic: a row's
// result must not depend on its neighbours or on the number of threads, so only an explicit number cuts.
void choose_splits(const Params &p, Plan &plan, int32_t threads) {
  int64_t total = 0;
  for (const RowTile &row_tile : plan.row_tiles) total += row_tile.cost();
  const int64_t fair = std::max<int64_t>(1, total / (4 * threads));
  int64_t partials = 0;
  for (RowTile &row_tile : plan.row_tiles) {
    const int64_t most = std::max<int64_t>(1, row_tile.keys / kMinSplitKeys);
    if (p.num_splits > 0) {
      row_tile.splits = static_cast<int32_t>(std::clamp<int64_t>(row_tile.keys, 1, p.num_splits));
    } else if (!p.deterministic && threads > 1 && plan.row_tiles.size() < 4 * static_cast<size_t>(threads)) {
      row_tile.splits = static_cast<int32_t>(std::clamp<int64_t>((row_tile.cost() + fair - 1) / fair, 1, most));
    }
    if (row_tile.splits == 1) continue;
    row_tile.first_partial = partials;
    partials += row_tile.splits;
    plan.partial_rows = std::max<int64_t>(plan.partial_rows, row_tile.rows * row_tile.heads);
  }
  plan.partial_o.resize(partials * plan.partial_rows * p.head_dim_v);
  plan.partial_ml.resize(partials * plan.partial_rows * 2);
}

// Longest first, so that the last jobs to end are short.
void order_jobs(Plan &plan) {
  for (size_t n = 0; n < plan.row_tiles.size(); ++n) {
    for (int32_t split = 0; split < plan.row_tiles[n].splits; ++split)
      plan.jobs.push_back({static_cast<int64_t>(n), split});
  }
  const auto cost = [&](const Job &job) {
    const RowTile &row_tile = plan.row_tiles[job.row_tile];
    return row_tile.cost() / row_tile.splits;
  };
  std::sort(plan.jobs.begin(), plan.jobs.end(), [&](const Job &a, const Job &b) {
    const int64_t first = cost(a), second = cost(b);
    return first != second ? first > second : a.row_tile != b.row_tile ? a.row_tile < b.row_tile : a.split < b.split;
  });
}

void run_job(const Params &p, const Functions &functions, Plan &plan, const Job &job) {
  const RowTile &row_tile = plan.row_tiles[job.row_tile];
  const int64_t group = p.num_heads_q / p.num_heads_kv;
  const Sequence s = sequence(p, row_tile.b);
  TileMask &mask = thread_mask();
  mask.set_tokens(p, s, row_tile.h_kv, row_tile.row0 / group, (row_tile.row0 + row_tile.rows - 1) / group);
  if (row_tile.splits > 1) {
    const int64_t keys = (row_tile.keys + row_tile.splits - 1) / row_tile.splits;
    mask.clip(job.split * keys, (job.split + 1) * keys);
  }
  Tile tile{};
  tile.p = &p;
  tile.s = s;
  tile.h_kv = row_tile.h_kv;
  tile.num_heads = row_tile.heads;
  tile.group = group;
  tile.row0 = row_tile.row0;
  tile.rows = row_tile.rows;
  tile.masks = mask.masks.data();
  tile.spans = mask.spans.data();
  tile.num_spans = static_cast<int32_t>(mask.spans.size());
  tile.dropout = plan.dropout;
  tile.leftpad = p.leftpad_k != nullptr ? p.leftpad_k[row_tile.b] : 0;
  tile.with_sink = job.split == 0;
  if (row_tile.splits > 1) {
    const int64_t at = (row_tile.first_partial + job.split) * plan.partial_rows;
    tile.partial_o = plan.partial_o.data() + at * p.head_dim_v;
    tile.partial_ml = plan.partial_ml.data() + at * 2;
  }
  tile.scratch = thread_scratch(scratch_floats(p.head_dim, p.head_dim_v, row_tile.rows, row_tile.heads));
  thread_local TileFunctions tile_functions;  // keeps its memory from tile to tile
  if (functions.any()) {
    tile_functions.start(functions, tile);
    tile.functions = &tile_functions;
  }
  kernels().run(tile);
}

// Row r of KV head number `head` of a tile from its partial rows, with weights 2^(m - max m) as in the softmax.
void combine_row(const Params &p, const Plan &plan, const RowTile &row_tile, const Sequence &s, int64_t head,
                 int64_t r) {
  const int64_t group = p.num_heads_q / p.num_heads_kv;
  const int64_t i = (row_tile.row0 + r) / group, h = (row_tile.h_kv + head) * group + (row_tile.row0 + r) % group;
  const auto partial = [&](int32_t split) {
    return (row_tile.first_partial + split) * plan.partial_rows + head * row_tile.rows + r;
  };
  float largest = -std::numeric_limits<float>::infinity();
  for (int32_t n = 0; n < row_tile.splits; ++n) largest = std::fmax(largest, plan.partial_ml[2 * partial(n)]);

  float row[kMaxHeadDim] = {};
  float sum = 0;
  for (int32_t n = 0; n < row_tile.splits; ++n) {
    const float row_max = plan.partial_ml[2 * partial(n)];
    // A split without a key that the row keeps adds nothing; one whose scores are NaN must add its NaN.
    const float weight = row_max == largest ? 1.0f : std::exp2(row_max - largest);
    sum += weight * plan.partial_ml[2 * partial(n) + 1];
    const float *o = plan.partial_o.data() + partial(n) * p.head_dim_v;
    for (int64_t x = 0; x < p.head_dim_v; ++x) row[x] += weight * o[x];
  }
  float factor = sum == 0 ? 0.0f : scale_at(p.v_descale, row_tile.b, row_tile.h_kv + head, p.v.dtype) / sum;
  factor *= plan.dropout.scale;
  if (p.output_scale != nullptr) factor /= *p.output_scale;
  const int64_t at = q_offset(p, p.out, s, i, h);
  for (int64_t x = 0; x < p.head_dim_v; ++x) store_from_float(p.out.data, at + x, p.out.dtype, row[x] * factor);
  if (p.lse != nullptr) {
    constexpr float kLn2 = 0.69314718055994530942f;
    p.lse[lse_offset(p, s, i, h)] =
        sum == 0 ? -std::numeric_limits<float>::infinity() : kLn2 * (largest + std::log2(sum));
  }
}

void combine_row_tile(const Params &p, const Plan &plan, const RowTile &row_tile) {
  if (row_tile.splits == 1) return;
  const Sequence s = sequence(p, row_tile.b);
  for (int64_t head = 0; head < row_tile.heads; ++head) {
    for (int64_t r = 0; r < row_tile.rows; ++r) combine_row(p, plan, row_tile, s, head, r);
  }
}

}  // namespace

const char *engine_target() {
  return kernels().target;
}

int32_t tile_rows(int64_t head_dim, int64_t head_dim_v, int64_t packed_rows) {
  if (packed_rows <= kStreamRows) return static_cast<int32_t>(packed_rows);
  // Q and O of a tile: 192 rows at D = Dv = 128, fewer at wider heads.
  const int64_t fit = std::clamp<int64_t>(kMaxTileRows * 256 / (head_dim + head_dim_v), 4 * kRowGroup, kMaxTileRows);
  const int64_t tiles = (packed_rows + fit - 1) / fit;
  return static_cast<int32_t>(std::min<int64_t>(round_up((packed_rows + tiles - 1) / tiles, kRowGroup), kMaxTileRows));
}

int32_t tile_heads(const Params &p, int32_t rows) {
  if (rows > kStreamRows || has_functions(p) || has_block_lists(p)) return 1;
  // Only heads that lie side by side within a token gain. Packed caches hold V's row between two of K's.
  const auto side_by_side = [](const flashspark_tensor &t, int64_t width) {
    return t.head_stride >= width && t.head_stride <= 2 * width &&
           (t.token_stride > t.head_stride || t.token_stride < -t.head_stride);
  };
  if (!side_by_side(p.k, p.head_dim) || !side_by_side(p.v, p.head_dim_v)) return 1;
  const int64_t bytes = std::max(p.head_dim, p.head_dim_v) * static_cast<int64_t>(dtype_size(p.k.dtype));
  return static_cast<int32_t>(
      std::clamp<int64_t>(kStreamBytes / bytes, 1, std::min<int64_t>(kMaxStreamHeads, p.num_heads_kv)));
}

void apply_functions(const Tile &tile, int64_t first, int64_t rows, int64_t key, int64_t count, float *scores,
                     int64_t row_stride, int64_t key_stride) {
  tile.functions->apply(first, rows, key, count, scores, row_stride, key_stride);
}

size_t scratch_floats(int64_t head_dim, int64_t head_dim_v, int32_t rows, int32_t num_heads) {
  const int64_t width = round_up(head_dim_v, kPackedPad);
  if (rows > kStreamRows) {
    const int64_t padded = round_up(rows, kRowGroup);
    return kPackedKeys * (head_dim + width) + padded * (width + kPackedKeys + head_dim);
  }
  // Rows go four at a time, and one vector of padding follows the scores.
  return round_up(rows, 4) * (num_heads * (head_dim + head_dim_v) + kBlockKeys) + 16;
}

void engine_forward(const Params &p) {
  Plan plan{};
  plan.dropout = dropout_of(p);
  cut_into_row_tiles(p, plan);
  if (plan.row_tiles.empty()) return;
  const int32_t wanted = p.num_threads > 0 ? p.num_threads : default_threads();
  const int32_t threads = plan.work < kSerialWork ? 1 : wanted;
  choose_splits(p, plan, threads);
  order_jobs(plan);
  const Functions functions(p);
  parallel_for(threads, static_cast<int64_t>(plan.jobs.size()),
               [&](int64_t n) { run_job(p, functions, plan, plan.jobs[n]); });
  if (!plan.partial_ml.empty()) {
    parallel_for(threads, static_cast<int64_t>(plan.row_tiles.size()),
                 [&](int64_t n) { combine_row_tile(p, plan, plan.row_tiles[n]); });
  }
  functions.errors().throw_first();
}

}  // namespace flashspark::cpu
