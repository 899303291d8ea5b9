#include <algorithm>
#include <cmath>
#include <iterator>
#include <tuple>

#include "cuda/arguments.hpp"
#include "cuda/backward.hpp"
#include "cuda/backward_division.hpp"
#include "cuda/function_plan.hpp"
#include "mod.hpp"

namespace flashspark::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
// Of ScoreMod::dropout, where P comes times the scale, in 16 bits.
constexpr float kMostDropout = 0.99f;

// The narrowest that can run it; of those that are equally narrow the fastest.
const BackwardInstance *choose_instance(const BackwardParams &params, const Machine &machine) {
  const Params &p = params.forward;
  if (takes_backward_functions(p)) {
    return std::find_if(std::begin(kBackwardFunctionInstances), std::end(kBackwardFunctionInstances),
                        [&](const BackwardInstance &instance) {
                          return fits(instance, p) && fits_functions(instance, instance.tile(machine.arch), params);
                        });
  }
  const BackwardInstance *best = nullptr;
  const auto rank = [&](const BackwardInstance &i) {
    return std::tuple(i.head_dim + i.head_dim_v, i.score_mod == ScoreMod::native, divide_backward(i, p, machine).cost);
  };
  for (const BackwardInstance &candidate : kBackwardInstances) {
    if (fits(candidate, p) && (best == nullptr || rank(candidate) < rank(*best))) best = &candidate;
  }
  return best;
}

void set_gradients(const BackwardParams &p, BackwardArguments &a) {
  a.dout = p.dout.data;
  a.dq = p.dq.data;
  a.dk = p.dk.data;
  a.dv = p.dv.data;
  a.dout_strides = strides_of(p.dout);
  a.dq_strides = strides_of(p.dq);
  a.dk_strides = strides_of(p.dk);
  a.dv_strides = strides_of(p.dv);
  a.dlse = p.dlse;
  a.dsinks = p.dsinks;
  a.drel_logits = p.drel_logits;
  a.dalibi_slopes = p.dalibi_slopes;
}

// Rows of scratch memory, and how many CTAs there are.
void set_blocks(const Params &p, const Shape &shape, const Machine &machine, BackwardPlan &plan) {
  BackwardArguments &a = plan.arguments;
  const int64_t rows = plan.tile->rows, keys = plan.tile->keys();
  const int64_t of_seq = std::max<int64_t>(1, ceil_div(a.max_seqlen_q, rows));
  const int64_t blocks = std::max<int64_t>(1, shape.varlen_q ? p.total_q / rows + p.num_seqs : p.num_seqs * of_seq);
  a.row_block = static_cast<int32_t>(rows);
  a.seq_row_blocks = static_cast<int32_t>(of_seq);
  a.num_row_blocks = static_cast<int32_t>(blocks);
  a.padded_rows = static_cast<int32_t>(blocks * rows);
  const int64_t key_tiles = key_tiles_of_head(p, keys);
  const BackwardDivision division = divide_backward(*plan.instance, p, machine);
  const int64_t parts = division.head_parts, pieces = division.num_pieces;
  const int64_t heads = p.num_heads_kv * (is_varlen_k(p) ? 1 : p.num_seqs) * parts;
  const int64_t ctas = pieces > 0 ? pieces : key_tiles * heads,
                places = int64_t{machine.sm_count} * plan.tile->min_ctas;
  const int64_t most = section_heads(p, *plan.tile, ctas, places, heads);
  const int64_t section = ceil_div(heads, ceil_div(heads, most));  // of equal size
  a.key_tile = static_cast<int32_t>(keys);
  a.num_key_tiles = static_cast<int32_t>(key_tiles);
  a.head_parts = static_cast<int32_t>(parts);
  a.num_pieces = static_cast<int32_t>(pieces);
  if (pieces > 0) {
    const int64_t all = division.head_length * heads;
    a.head_length = make_divisor(static_cast<uint32_t>(division.head_length));
    a.piece_length = static_cast<int32_t>(all / pieces);
    a.longer_pieces = static_cast<int32_t>(all % pieces);
    const int64_t of_tiles = key_tiles * plan.tile->tile_blocks(), group = p.num_heads_q / p.num_heads_kv;
    a.head_blocks = static_cast<int32_t>((division.head_length - of_tiles) / group);
    a.num_walks = static_cast<int32_t>(division.num_walks);
    a.walk_heads = static_cast<int32_t>(division.walk_heads);
    a.walk_parts = static_cast<int32_t>(division.walk_parts);
    a.num_slots = a.num_pieces;
    if (division.num_walks > 0) {
      // The last CTAs of a KV head leave nothing; else a part of a pair may leave sums of both tiles, where other query
      // heads of the group are of other CTAs.
      const int64_t leaves = pieces - heads * division.num_walks;
      a.num_slots = static_cast<int32_t>(p.causal != 0 && division.walk_heads < group ? 2 * leaves : leaves);
    }
  }
  a.section_heads = static_cast<int32_t>(section);
  const auto grid = [](int64_t n) { return static_cast<uint32_t>(n); };
  plan.preprocess = {{grid(blocks * p.num_heads_q), 1, 1}, traits_of(Operation::attention_backward_preprocess).threads};
  plan.main = {{grid(ctas), 1, 1},
               static_cast<uint32_t>(plan.tile->threads()),
               static_cast<uint32_t>(shared_bytes(*plan.instance, *plan.tile))};
  const int64_t summed = (a.dq != nullptr ? blocks * p.num_heads_q : 0) + (parts > 1 ? ctas : 0);
  if (summed > 0)
    plan.postprocess = {{grid(summed), 1, 1}, traits_of(Operation::attention_backward_postprocess).threads};
}

// Sums of gradients in float32.
void set_gradient_sums(const Params &p, BackwardPlan &plan) {
  const BackwardArguments &a = plan.arguments;
  plan.row_bytes = static_cast<size_t>(p.num_heads_q) * static_cast<size_t>(a.padded_rows) * sizeof(float);
  const int64_t sums = plan.tile->dq_sums();
  if (a.dq != nullptr && sums > 1) plan.arguments.dq_sum_rows = p.num_heads_q * a.padded_rows;
  if (a.dq != nullptr) plan.dq_bytes = plan.row_bytes * static_cast<size_t>(a.sum_columns) * static_cast<size_t>(sums);
  if (a.dq != nullptr && p.deterministic != 0) {
    // A multiple of 16 bytes, as all is that lies before the others.
    const int64_t turns = sums * p.num_heads_q * a.num_row_blocks;
    plan.turn_bytes = static_cast<size_t>(ceil_div(turns, 4)) * 16;
  }
  const auto slots = static_cast<size_t>(a.num_slots);
  plan.piece_bytes = slots * static_cast<size_t>(a.key_tile * (a.sum_columns + a.sum_columns_v)) * sizeof(float);
  plan.flag_bytes = slots * static_cast<size_t>(plan.tile->warps) * sizeof(int32_t);
  if (a.dq != nullptr && a.num_pieces > 0) {
    const int64_t heads = p.num_seqs * p.num_heads_q;
    plan.added_bytes = static_cast<size_t>(ceil_div(heads, 4)) * 16;  // as turn_bytes
  }
  if (a.head_parts == 1) return;
  const size_t key_bytes =
      size_t{plan.main.grid[0]} / static_cast<size_t>(a.head_parts) * static_cast<size_t>(a.key_tile) * sizeof(float);
  if (a.dk != nullptr) plan.dk_bytes = key_bytes * static_cast<size_t>(a.sum_columns);
  if (a.dv != nullptr) plan.dv_bytes = key_bytes * static_cast<size_t>(a.sum_columns_v);
}

// What is not summed by the kernel that computes it: scratch memory for the parts, and the kernel that adds them.
void set_sums(const Params &p, BackwardPlan &plan) {
  BackwardArguments &a = plan.arguments;
  a.slot_warps = plan.tile->warps;
  a.key_slots =
      static_cast<int32_t>(is_varlen_k(p) ? p.total_k / a.key_tile + p.num_seqs : p.num_seqs * a.num_key_tiles);
  const auto heads = static_cast<size_t>(p.num_heads_q);
  const auto parts = [](int32_t places, uint32_t warps) { return static_cast<size_t>(places) * warps * sizeof(float); };
  int64_t numbers = 0;
  if (a.dsinks != nullptr) {
    plan.sink_bytes = heads * parts(a.num_row_blocks, plan.preprocess.threads / 32);
    numbers += p.num_heads_q;
  }
  if (a.dalibi_slopes != nullptr) {
    plan.slope_bytes = heads * parts(a.key_slots, static_cast<uint32_t>(a.slot_warps));
    numbers += p.num_heads_q * (p.alibi_batch_stride != 0 ? p.num_seqs : 1);
  }
  const uint32_t threads = traits_of(Operation::attention_backward_sums).threads;
  plan.sums = {{static_cast<uint32_t>(ceil_div(numbers, threads / 32)), 1, 1}, threads};
}

}  // namespace

bool fits(const BackwardInstance &instance, const Params &p) {
  if (takes_backward_functions(p) != is_of_functions(instance.index)) return false;
  const BackwardTile &tile = instance.sm_120f;
  const bool is_ordered = tile.order == SumOrder::turns || tile.order == SumOrder::walks;
  if (p.deterministic != 0 ? tile.order == SumOrder::unordered : is_ordered) return false;
  if (tile.order == SumOrder::walks && !fits_walks(instance, p)) return false;
  if (p.head_dim > instance.head_dim || p.head_dim_v > instance.head_dim_v) return false;
  const bool modified = shape_of(p).needs_score_mod, drops = p.dropout_p > 0;
  switch (instance.score_mod) {
    case ScoreMod::none:
      return !modified && !drops;
    case ScoreMod::native:
      return true;
    case ScoreMod::dropout:
      return !modified && drops && p.dropout_p <= kMostDropout;
  }
  return false;
}

BackwardPlan make_backward_plan(const BackwardParams &params, const Machine &machine,
                                const BackwardInstance *instance) {
  const Params &p = params.forward;
  // Functions and lists do not change how heads are grouped here.
  Params plain = p;
  plain.score_mod = plain.mask_mod = {};
  plain.masked_blocks = plain.full_blocks = {};
  const Shape shape = shape_of(plain);
  BackwardPlan plan;
  plan.instance = instance != nullptr ? instance : choose_instance(params, machine);
  plan.tile = &plan.instance->tile(machine.arch);
  plan.dtype = p.q.dtype == FLASHSPARK_BFLOAT16 ? KernelDType::bf16 : KernelDType::fp16;
  BackwardArguments &a = plan.arguments;
  static_cast<AttentionArguments &>(a) = arguments_of(p, shape, ScoreMod::native);  // scale in natural units
  a.scale_log2 = a.softmax_scale * kLog2e;
  a.cap_log2 = a.softcap * kLog2e;
  a.cap_factor = a.softcap > 0 ? a.softmax_scale * (2 * kLog2e / a.softcap) : 0.0f;
  a.dropout = dropout_arguments(p);
  a.lse_shift = 0, a.delta_scale = 1;
  if (plan.instance->score_mod == ScoreMod::dropout)
    a.lse_shift = -std::log2(a.dropout.scale), a.delta_scale = -1 / a.dropout.scale, a.dropout.scale = 1;
  set_gradients(params, a);
  a.sum_columns = plan.instance->head_dim;
  a.sum_columns_v = plan.instance->head_dim_v;
  set_blocks(p, shape, machine, plan);
  if (takes_backward_functions(p)) {
    plan.functions = plan_backward_functions(params, *plan.instance, *plan.tile);
    plan.main.shared_bytes = plan.functions->shared_bytes;
  }
  set_gradient_sums(p, plan);
  set_sums(p, plan);
  return plan;
}

void BackwardPlan::bind(void *memory) {
  auto *at = static_cast<char *>(memory);
  const auto take = [&at](size_t bytes) {
    auto *taken = bytes > 0 ? reinterpret_cast<float *>(at) : nullptr;
    at += bytes;
    return taken;
  };
  arguments.dq_turns = reinterpret_cast<int32_t *>(take(turn_bytes));
  arguments.dq_sum = take(dq_bytes);
  arguments.dk_sum = take(dk_bytes);
  arguments.dv_sum = take(dv_bytes);
  arguments.piece_sums = take(piece_bytes);
  arguments.piece_flags = reinterpret_cast<int32_t *>(take(flag_bytes));
  arguments.added_blocks = reinterpret_cast<int32_t *>(take(added_bytes));
  arguments.row_lse = take(row_bytes);
  arguments.row_delta = take(row_bytes);
  arguments.sink_sums = take(sink_bytes);
  arguments.slope_sums = take(slope_bytes);
  if (functions) functions->bind(static_cast<char *>(memory) + own_bytes());
}

std::string to_string(const BackwardPlan &plan) {
  std::string text = plan.functions ? to_string(*plan.functions) : "";
  text += to_string(plan.preprocess_key(), plan.preprocess) + "\n";
  if (plan.main.grid[0] > 0) {
    text += to_string(plan.main_key(), plan.main) + (plan.functions ? ", compiled at run time" : "") +
            (plan.functions && plan.functions->native ? ", beside built-in biases or masks" : "") +
            (plan.functions && plan.functions->block_sparse ? ", over block lists" : "") + ", tile " +
            std::to_string(plan.tile->rows) + " x " + std::to_string(plan.tile->keys()) +
            (plan.arguments.head_parts > 1 ? ", a query head a CTA" : "") +
            (plan.arguments.num_walks > 0    ? ", equal parts of walks"
             : plan.arguments.num_pieces > 0 ? ", equal parts of all tiles"
                                             : "") +
            "\n";
  }
  if (plan.postprocess.grid[0] > 0) text += to_string(plan.postprocess_key(), plan.postprocess) + "\n";
  if (plan.sums.grid[0] > 0) text += to_string(plan.sums_key(), plan.sums) + "\n";
  if (plan.functions) text += text_behind(*plan.functions);
  return text + "scratch memory: " + std::to_string(plan.workspace()) + " bytes, " +
         (plan.arguments.dq_sum_rows > 0 ? "dq in float32, twice, "
          : plan.dq_bytes > 0            ? "dq in float32, "
                                         : "") +
         (plan.dk_bytes + plan.dv_bytes + plan.piece_bytes > 0 ? "dk and dv in float32, " : "") + "two values a row" +
         (plan.functions && plan.functions->block_bytes > 0 ? ", a byte for each pair of blocks" : "") +
         (plan.functions && plan.functions->sums_exactly() ? ", exact sums for captured tensors" : "") + "\n";
}

}  // namespace flashspark::cuda
