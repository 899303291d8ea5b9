#include "cuda/quantize.hpp"

#include "cuda/arguments.hpp"

namespace flashspark::cuda {
namespace {

constexpr OperationTraits kQuantize = traits_of(Operation::attention_forward_quantize);

// q's type, or fp16 where q is e4m3: fp16 has more mantissa bits than bf16.
int32_t wide_dtype(const Params &p) {
  return p.q.dtype == FLASHSPARK_FLOAT8_E4M3 ? FLASHSPARK_FLOAT16 : p.q.dtype;
}

}  // namespace

bool is_quantized(const Params &p) {
  return p.out.dtype == FLASHSPARK_FLOAT8_E4M3;
}

size_t wide_out_bytes(const Params &p) {
  constexpr int64_t kAlignment = 16;  // of the partial results behind them
  const int64_t elements = shape_of(p).tokens * p.num_heads_q * p.head_dim_v;
  return static_cast<size_t>(ceil_div(elements * 2, kAlignment) * kAlignment);
}

Params with_wide_out(const Params &p, void *memory) {
  Params wide = p;
  const int64_t token = p.num_heads_q * p.head_dim_v;
  wide.out = {memory, p.max_seqlen_q * token, token, p.head_dim_v, wide_dtype(p), 0};
  wide.output_scale = nullptr;
  return wide;
}

QuantizePlan make_quantize_plan(const Params &p, const Params &wide) {
  QuantizePlan plan;
  const Shape shape = shape_of(p);
  if (shape.is_empty()) return plan;
  ForwardArguments &a = plan.arguments.forward = arguments_of(wide, shape, ScoreMod::none);
  a.out_dtype = dtype_of(wide.out.dtype);
  a.num_m_blocks = static_cast<int32_t>(shape.num_m_blocks(kQuantize.rows));
  a.num_heads_times_batch = a.l2_section_heads = static_cast<int32_t>(shape.grid_heads);
  plan.arguments.out = p.out.data;
  plan.arguments.out_strides = strides_of(p.out);
  plan.arguments.output_scale = p.output_scale;
  plan.launch = {
      {static_cast<uint32_t>(int64_t{a.num_m_blocks} * a.num_heads_times_batch), 1, 1}, kQuantize.threads, 0};
  return plan;
}

}  // namespace flashspark::cuda
