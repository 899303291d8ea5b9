// Cases whose gradients are verified and timed.
#include "cases/backward.hpp"

namespace flashspark::cases {

bool has_gradients(const Case &spec) {
  const bool fp8 = spec.q_dtype == FLASHSPARK_FLOAT8_E4M3 || spec.kv_dtype == FLASHSPARK_FLOAT8_E4M3;
  return !fp8 && spec.q_dtype == spec.kv_dtype && spec.kv_layout != Layout::kPaged && !spec.kv_batch_index &&
         spec.leftpad == 0 && spec.num_splits == 0;
}

std::vector<Case> backward_matrix() {
  std::vector<Case> cases;
  for (Case &c : feature_matrix()) {
    if (!has_gradients(c)) continue;
    c.name.insert(0, "backward/"), c.group.insert(0, "backward/");
    c.backward = true;
    cases.push_back(std::move(c));
  }
  return cases;
}

std::vector<Case> backward_bench_cases() {
  std::vector<Case> cases;
  Case base;
  base.group = "backward";
  base.backward = true;
  base.lens = {{4096, 4096}};
  base.heads_q = 16, base.heads_kv = 8, base.head_dim = 128;
  base.q_layout = base.kv_layout = Layout::kDense;
  base.causal = true;
  const auto add = [&](const char *name, auto &&...changes) {
    Case c = base;
    (changes(c), ...);
    c.name = std::string("backward/") + name;
    cases.push_back(std::move(c));
  };
  const auto short_one = [](Case &c) { c.lens = {{1024, 1024}}; };
  const auto float32 = [](Case &c) { c.q_dtype = c.kv_dtype = c.out_dtype = FLASHSPARK_FLOAT32; };
  add("S1024-bf16", short_one);
  add("S1024-f32", short_one, float32);
  add("S4096-bf16");
  add("S4096-full-bf16", [](Case &c) { c.causal = false; });
  add("S4096-d64-bf16", [](Case &c) { c.head_dim = 64; });
  add("S1024-d256-bf16", short_one, [](Case &c) { c.head_dim = 256; });
  add("S4096-window512-bf16", [](Case &c) { c.window_left = 511; });
  add("S1024-softcap30-bf16", short_one, [](Case &c) { c.softcap = 30; });
  add("S1024-dropout0.1-bf16", short_one, [](Case &c) { c.dropout = 0.1f; });
  add("documents-bf16", [](Case &c) {
    c.lens = {{1800, 1800}, {130, 130}, {1000, 1000}, {40, 40}, {1126, 1126}};
    c.q_layout = c.kv_layout = Layout::kVarlen;
  });
  return cases;
}

}  // namespace flashspark::cases
