// Fuzzes gradients: any params struct can be validated without a crash, and a small valid problem runs cleanly on every
// implementation, in buffers exactly as large as the struct describes, whatever numbers out, lse and dout hold.
#include <cmath>
#include <cstddef>
#include <string>

#include "problem.hpp"

namespace {

using namespace flashspark::fuzz;
using B = flashspark_attention_backward_params;

#define F(name)                        \
  Field {                              \
    offsetof(B, name), sizeof(B::name) \
  }
#define TENSOR(t) F(t.batch_stride), F(t.token_stride), F(t.head_stride), F(t.dtype)
constexpr Field kFields[] = {F(struct_size), F(abi_version), TENSOR(dout),     TENSOR(dq),
                             TENSOR(dk),     TENSOR(dv),     F(workspace_size)};

// The problem with gradients like its tensors, some of them wanted.
B with_gradients(const P &forward, Stream &in) {
  B b;
  flashspark_attention_backward_params_init(&b);
  b.forward = forward;
  P &p = b.forward;
  const uint16_t wanted = in.raw<uint16_t>();
  // Mostly what has gradients: one type, no cache, lse.
  if ((wanted & 7) != 0) p.k.dtype = p.v.dtype = p.out.dtype = p.q.dtype;
  if ((wanted & 7) != 1) p.page_table = p.leftpad_k = p.kv_batch_index = nullptr, p.output_scale = nullptr;
  if ((wanted & 7) != 2) p.lse = static_cast<float *>(nowhere(4));
  b.dout = p.out, b.dq = p.q, b.dk = p.k, b.dv = p.v;
  uintptr_t next = kNumTensors;
  b.dout.data = nowhere(next++);
  for (int bit = 3; flashspark_tensor * t : {&b.dq, &b.dk, &b.dv})
    t->data = (wanted >> bit++ & 1) != 0 ? nullptr : nowhere(next++);
  const auto floats = [&](int bit) {
    return (wanted >> bit & 1) != 0 ? nullptr : static_cast<float *>(nowhere(next++));
  };
  b.dlse = floats(6);
  if (p.sinks != nullptr) b.dsinks = floats(7);
  if (p.rel_logits != nullptr) b.drel_logits = floats(8);
  if (p.alibi_slopes != nullptr) b.dalibi_slopes = floats(9);
  for (int64_t patches = in.below(4); patches > 0; --patches)
    kFields[in.below(std::size(kFields))].set(&b, in.number());
  return b;
}

// Memory of the gradients, as exact as the forward pass's.
struct Memory {
  Block forward[6], rows[4], floats[4];
};

bool attach(B &b, Memory &memory) {
  P &p = b.forward;
  if (!attach(p, memory.forward)) return false;
  const bool varlen_q = p.cu_seqlens_q != nullptr, varlen_k = p.cu_seqlens_k != nullptr;
  const int64_t q_batch = varlen_q ? 1 : p.num_seqs, q_tokens = varlen_q ? p.total_q : p.max_seqlen_q;
  const int64_t k_batch = varlen_k ? 1 : p.num_seqs, k_tokens = varlen_k ? p.total_k : p.max_seqlen_k;
  const auto fit = [](Block &block, flashspark_tensor &t, int64_t batch, int64_t tokens, int64_t heads, int64_t width) {
    if (t.data == nullptr) return true;
    const auto size = static_cast<int64_t>(flashspark_dtype_size(t.dtype));
    const bool fits = block.fit({batch, tokens, heads}, {t.batch_stride, t.token_stride, t.head_stride}, width, size);
    t.data = block.origin;
    return fits;
  };
  const auto floats = [&](int n, auto *&data, int64_t batch, const flashspark_tensor &strides, int64_t tokens,
                          int64_t heads, int64_t width) {
    if (data == nullptr) return true;
    flashspark_tensor t = strides;
    t.dtype = FLASHSPARK_FLOAT32, t.data = const_cast<float *>(data);
    const bool fits = fit(memory.floats[n], t, batch, tokens, heads, width);
    data = static_cast<float *>(t.data);
    return fits;
  };
  const flashspark_tensor lse{nullptr, p.lse_batch_stride, p.lse_token_stride, p.lse_head_stride, 0, 0};
  const flashspark_tensor rel{nullptr, 0, p.rel_token_stride, p.rel_head_stride, 0, 0};
  const flashspark_tensor slopes{nullptr, p.num_heads_q, 0, 1, 0, 0};
  const int64_t slope_sets = p.alibi_batch_stride != 0 ? p.num_seqs : 1;
  return fit(memory.rows[0], b.dout, q_batch, q_tokens, p.num_heads_q, p.head_dim_v) &&
         fit(memory.rows[1], b.dq, q_batch, q_tokens, p.num_heads_q, p.head_dim) &&
         fit(memory.rows[2], b.dk, k_batch, k_tokens, p.num_heads_kv, p.head_dim) &&
         fit(memory.rows[3], b.dv, k_batch, k_tokens, p.num_heads_kv, p.head_dim_v) &&
         floats(0, b.dlse, q_batch, lse, q_tokens, p.num_heads_q, 1) &&
         floats(1, b.dsinks, 1, slopes, 1, p.num_heads_q, 1) &&
         floats(2, b.drel_logits, 1, rel, q_batch * q_tokens, p.num_heads_q, p.rel_extent) &&
         floats(3, b.dalibi_slopes, slope_sets, slopes, 1, p.num_heads_q, 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Stream in(data, size);
  const Attention problem(in);
  B b = with_gradients(problem.params, in);
  const bool own_forward = in.below(4) != 0;

  const flashspark_status status = flashspark_attention_backward_validate(&b);
  char text[200];
  flashspark_attention_backward_explain(&b, text, sizeof text);
  size_t scratch = 0;
  flashspark_attention_backward_workspace_size(&b, &scratch);
  if (status != FLASHSPARK_OK) {
    const char *error = flashspark_last_error();
    if (std::string(error).find_first_of("=:") == std::string::npos) complain("an error that names no argument");
    if (flashspark_attention_backward(&b) == FLASHSPARK_OK) complain("backward accepts what validate refuses");
    return 0;
  }
  Memory memory;
  if (b.forward.device != FLASHSPARK_CPU || 2.5 * work(b.forward) > 3e6 || !attach(b, memory)) return 0;
  if (own_forward) {  // else out and lse hold any numbers
    b.forward.implementation = "cpu-engine";
    flashspark_attention_forward(&b.forward);
  }
  for (const char *implementation : {"cpu-engine", "cpu-reference"}) {
    b.forward.implementation = implementation;
    if (flashspark_attention_backward(&b) != FLASHSPARK_OK) complain("backward refuses what validate accepts");
  }
  return 0;
}
