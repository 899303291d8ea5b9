#include <algorithm>
#include <iterator>
#include <tuple>

#include "cuda/arguments.hpp"
#include "cuda/backward.hpp"
#include "cuda/function_plan.hpp"

namespace flashspark::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// About how long an instance takes, in products of a row with a key: CTAs take turns on the SMs, and under a causal
// mask or a window they differ in length, so that others fill the gaps.
double cost(const BackwardInstance &instance, const Params &p, const Machine &machine) {
  const BackwardTile &tile = instance.tile(machine.arch);
  const int64_t group = p.num_heads_q / p.num_heads_kv;
  const auto longest = static_cast<double>(tile.keys() * p.max_seqlen_q * group);
  const int64_t key_tiles =
      is_varlen_k(p) ? ceil_div(p.total_k, tile.keys()) : ceil_div(p.max_seqlen_k, tile.keys()) * p.num_seqs;
  const int64_t ctas = key_tiles * p.num_heads_kv, places = int64_t{machine.sm_count} * tile.min_ctas;
  const bool differ = p.causal != 0 || p.window_left >= 0 || p.window_right >= 0;
  const double turns = differ ? std::max(1.0, 0.5 * static_cast<double>(ctas) / static_cast<double>(places))
                              : static_cast<double>(ceil_div(ctas, places));
  // Fewer keys a CTA: each row is read and dQ added to more often.
  constexpr double kCostOfRowGroups = 1.15;
  return turns * longest * tile.min_ctas * (tile.sharing == KeySharing::rows ? kCostOfRowGroups : 1);
}

// The narrowest that can run it; of those that are equally narrow the fastest.
const BackwardInstance *choose_instance(const Params &p, const Machine &machine) {
  if (takes_backward_functions(p)) {
    return std::find_if(std::begin(kBackwardFunctionInstances), std::end(kBackwardFunctionInstances),
                        [&](const BackwardInstance &instance) { return fits(instance, p); });
  }
  const BackwardInstance *best = nullptr;
  const auto rank = [&](const BackwardInstance &i) {
    return std::tuple(i.head_dim + i.head_dim_v, i.score_mod != ScoreMod::none, cost(i, p, machine));
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
}

// Rows of scratch memory, and how many CTAs there are.
void set_blocks(const Params &p, const Shape &shape, BackwardPlan &plan) {
  BackwardArguments &a = plan.arguments;
  const int64_t rows = plan.tile->rows, keys = plan.tile->keys();
  const int64_t of_seq = std::max<int64_t>(1, ceil_div(a.max_seqlen_q, rows));
  const int64_t blocks = std::max<int64_t>(1, shape.varlen_q ? p.total_q / rows + p.num_seqs : p.num_seqs * of_seq);
  a.row_block = static_cast<int32_t>(rows);
  a.seq_row_blocks = static_cast<int32_t>(of_seq);
  a.num_row_blocks = static_cast<int32_t>(blocks);
  a.padded_rows = static_cast<int32_t>(blocks * rows);
  const int64_t of_longest = ceil_div(p.max_seqlen_k, keys);
  const bool varlen_k = is_varlen_k(p);
  const int64_t key_tiles = varlen_k ? std::min(of_longest * p.num_seqs, p.total_k / keys + p.num_seqs) : of_longest;
  a.num_key_tiles = static_cast<int32_t>(key_tiles);
  const int64_t heads = p.num_heads_kv * (varlen_k ? 1 : p.num_seqs);
  const auto grid = [](int64_t ctas) { return static_cast<uint32_t>(ctas); };
  plan.preprocess = {{grid(blocks * p.num_heads_q), 1, 1}, traits_of(Operation::attention_backward_preprocess).threads};
  plan.main = {{grid(key_tiles * heads), 1, 1},
               static_cast<uint32_t>(plan.tile->threads()),
               static_cast<uint32_t>(shared_bytes(*plan.instance, *plan.tile))};
  if (a.dq != nullptr) {
    plan.postprocess = {{grid(blocks * p.num_heads_q), 1, 1},
                        traits_of(Operation::attention_backward_postprocess).threads};
  }
}

}  // namespace

bool fits(const BackwardInstance &instance, const Params &p) {
  if (takes_backward_functions(p) != is_of_functions(instance.index)) return false;
  const bool modified = p.softcap > 0 || p.dropout_p > 0;
  return p.head_dim <= instance.head_dim && p.head_dim_v <= instance.head_dim_v &&
         (!modified || instance.score_mod == ScoreMod::native);
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
  plan.instance = instance != nullptr ? instance : choose_instance(p, machine);
  plan.tile = &plan.instance->tile(machine.arch);
  plan.dtype = p.q.dtype == FLASHSPARK_BFLOAT16 ? KernelDType::bf16 : KernelDType::fp16;
  BackwardArguments &a = plan.arguments;
  static_cast<AttentionArguments &>(a) = arguments_of(p, shape, ScoreMod::native);  // scale in natural units
  a.scale_log2 = a.softmax_scale * kLog2e;
  a.cap_log2 = a.softcap * kLog2e;
  a.cap_factor = a.softcap > 0 ? a.softmax_scale * (2 * kLog2e / a.softcap) : 0.0f;
  a.dropout = dropout_arguments(p);
  set_gradients(params, a);
  a.sum_columns = plan.instance->head_dim;
  set_blocks(p, shape, plan);
  if (takes_backward_functions(p)) {
    plan.functions = plan_backward_functions(params, *plan.instance, *plan.tile);
    plan.main.shared_bytes = plan.functions->shared_bytes;
  }
  plan.row_bytes = static_cast<size_t>(p.num_heads_q) * static_cast<size_t>(a.padded_rows) * sizeof(float);
  if (a.dq != nullptr) plan.sum_bytes = plan.row_bytes * static_cast<size_t>(a.sum_columns);
  return plan;
}

void BackwardPlan::bind(void *memory) {
  auto *at = static_cast<char *>(memory);
  arguments.dq_sum = sum_bytes > 0 ? reinterpret_cast<float *>(at) : nullptr;
  arguments.row_lse = reinterpret_cast<float *>(at + sum_bytes);
  arguments.row_delta = reinterpret_cast<float *>(at + sum_bytes + row_bytes);
  if (functions) functions->bind(at + sum_bytes + 2 * row_bytes);
}

FunctionBackwardArguments BackwardPlan::function_arguments() const {
  FunctionBackwardArguments a{arguments, functions->functions, {}, functions->block_arguments.table};
  std::copy(std::begin(functions->gradients), std::end(functions->gradients), a.gradients);
  return a;
}

std::string to_string(const BackwardPlan &plan) {
  std::string text = plan.functions ? to_string(*plan.functions) : "";
  text += to_string(plan.preprocess_key(), plan.preprocess) + "\n";
  if (plan.main.grid[0] > 0) {
    text += to_string(plan.main_key(), plan.main) + (plan.functions ? ", compiled at run time" : "") +
            (plan.functions && plan.functions->block_sparse ? ", over block lists" : "") + ", tile " +
            std::to_string(plan.tile->rows) + " x " + std::to_string(plan.tile->keys()) + "\n";
  }
  if (plan.postprocess.grid[0] > 0) text += to_string(plan.postprocess_key(), plan.postprocess) + "\n";
  return text + "scratch memory: " + std::to_string(plan.workspace()) + " bytes, " +
         (plan.sum_bytes > 0 ? "dq in float32 and " : "") + "two values a row" +
         (plan.functions && plan.functions->bytes > 0 ? ", a byte for each pair of blocks" : "") + "\n";
}

}  // namespace flashspark::cuda
