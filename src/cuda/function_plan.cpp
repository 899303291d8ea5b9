#include "cuda/function_plan.hpp"

#include <algorithm>

#include "cuda/arguments.hpp"
#include "dropout.hpp"
#include "mod.hpp"

namespace flashspark::cuda {
namespace {

BlockSparseArguments blocks_of(const Params &p, const Shape &shape, const Tile &tile) {
  BlockSparseArguments a{};
  a.masked = block_list_of(p, p.masked_blocks);
  a.full = block_list_of(p, p.full_blocks);
  a.block_tokens = make_divisor(static_cast<uint32_t>(p.block_size_q));
  a.tiles_per_block = make_divisor(static_cast<uint32_t>(p.block_size_k / tile.keys));
  a.last_query_block = static_cast<int32_t>(p.num_blocks_q - 1);
  a.last_key_block = static_cast<int32_t>(key_blocks(p) - 1);
  a.kv_group = make_divisor(static_cast<uint32_t>(shape.num_heads_kv / p.num_heads_kv));
  return a;
}

void add_function(const flashspark_function &function, int32_t first_tensor, int32_t first_scalar,
                  FunctionArguments &a) {
  if (function.mod == nullptr) return;
  for (int32_t n = 0; n < function.num_tensors && n < function.mod->graph.num_tensors; ++n) {
    const flashspark_captured_tensor &from = function.tensors[n];
    CapturedTensor &to = a.tensors[first_tensor + n];
    to.data = from.data;
    for (int32_t d = 0; d < from.rank; ++d) {
      to.strides[d] = from.strides[d];
      to.shape[d] = static_cast<int32_t>(from.shape[d]);
    }
  }
  for (const graph::Node &node : function.mod->graph.nodes) {
    if (node.op != graph::Op::Scalar) continue;
    const double value = function.scalars[node.number];
    CapturedScalar &to = a.scalars[first_scalar + node.number];
    if (node.type == graph::Type::f32) {
      to.real = value;
    } else {
      to.integer = static_cast<int64_t>(value);
    }
  }
}

}  // namespace

DropoutArguments dropout_arguments(const Params &p) {
  const DropoutLimit limit = dropout_limit(p.dropout_p);
  return {p.dropout_state,        p.dropout_seed,         p.dropout_offset,
          limit.limit * 0x10001u, limit.keeps ? ~0u : 0u, dropout_scale(p.dropout_p)};
}

bool fits_blocks(const Shape &shape, const Tile &tile) {
  if (!shape.block_sparse) return true;
  if (shape.left_padded || tile.rows() % shape.group != 0) return false;
  return shape.block_size_q % (tile.rows() / shape.group) == 0 && shape.block_size_k % tile.keys == 0;
}

FunctionPlan plan_functions(const Params &p, const Shape &shape, const Instance &instance, const Tile &tile) {
  FunctionPlan plan;
  plan.native = instance.score_mod == ScoreMod::native;
  plan.block_sparse = shape.block_sparse;
  plan.wide_positions = shape.wide_positions;
  plan.dropout = p.dropout_p > 0;
  plan.contiguous = !is_paged(p);
  if (plan.dropout) plan.dropout_arguments = dropout_arguments(p);
  if (plan.block_sparse && fits_blocks(shape, tile)) {
    plan.arguments.blocks = blocks_of(p, shape, tile);
  } else if (plan.block_sparse) {
    plan.block_tiles = plan_block_tiles(p, shape, tile);
    plan.arguments.blocks = plan.block_tiles->lists;
  }
  add_functions(p, plan.arguments);
  return plan;
}

void add_functions(const Params &p, FunctionArguments &a) {
  add_function(p.score_mod, 0, 0, a);
  const bool has_score = p.score_mod.mod != nullptr;
  add_function(p.mask_mod, has_score ? p.score_mod.mod->graph.num_tensors : 0,
               has_score ? p.score_mod.mod->graph.num_scalars : 0, a);
}

FunctionArguments mask_arguments(const flashspark_function &mask) {
  FunctionArguments a{};
  add_function(mask, 0, 0, a);
  return a;
}

}  // namespace flashspark::cuda
