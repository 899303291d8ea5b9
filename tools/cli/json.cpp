#include "cli/json.hpp"

#include <cstdio>
#include <ctime>

#include "cli/gpu_run.hpp"

namespace flashspark::cli {

Json to_json(const Machine &m) {
  return {{"cpu", m.cpu},
          {"arch", m.arch},
          {"simd", m.simd},
          {"cores", m.cores},
          {"cpu_limit", m.cpu_limit > 0 ? Json(m.cpu_limit) : Json()},
          {"threads", m.threads},
          {"memory_gib", m.memory_gib},
          {"os", m.os},
          {"kernel", m.kernel},
          {"compiler", m.compiler}};
}

Json to_json(const Limits &limits) {
  return {{"fp32_gflops", limits.flops / 1e9}, {"copy_gb_per_s", limits.bytes / 1e9}};
}

Json to_json(const GpuFacts &facts) {
  Json gpus = Json::array();
  for (const Gpu &gpu : facts.gpus) {
    gpus.push_back({{"name", gpu.name},
                    {"compute_capability", std::to_string(gpu.major) + "." + std::to_string(gpu.minor)},
                    {"memory_gib", gpu.memory_gib}});
  }
  const auto text = [](const std::string &s) { return s.empty() ? Json() : Json(s); };
  return {{"gpus", gpus},
          {"driver", text(facts.driver)},
          {"driver_cuda_version", facts.cuda_version > 0 ? Json(facts.cuda_version) : Json()},
          {"driver_error", text(facts.error)},
          {"toolkit", text(facts.toolkit)},
          {"toolkit_version", text(facts.toolkit_version)}};
}

Json to_json(GpuSession &gpu) {
  return {{"name", gpu.facts().name},
          {"kernels", cuda::architecture_name(gpu.facts().machine.arch)},
          {"bf16_mma_tflops", gpu.limits().flops / 1e12},
          {"copy_gb_per_s", gpu.limits().bytes / 1e9}};
}

Json to_json(const cases::Case &c) {
  using cases::dtype_name;
  const auto layout = [](cases::Layout l) {
    return l == cases::Layout::kDense ? "dense" : l == cases::Layout::kVarlen ? "varlen" : "paged";
  };
  Json lens = Json::array();
  for (const cases::SeqLen &len : c.lens) lens.push_back({len.q, len.k});
  Json json = {{"name", c.name},
               {"lens", lens},
               {"heads", {c.heads_q, c.heads_kv}},
               {"head_dim", {c.head_dim, c.head_dim_v ? c.head_dim_v : c.head_dim}},
               {"dtypes", {dtype_name(c.q_dtype), dtype_name(c.kv_dtype), dtype_name(c.out_dtype)}},
               {"layout", {layout(c.q_layout), layout(c.kv_layout)}}};
  if (c.kv_layout == cases::Layout::kPaged) json["page_size"] = c.page_size;
  json["num_splits"] = c.num_splits;
  json["seed"] = c.seed;
  json["features"] = cases::features(c);
  return json;
}

Json report_header() {
  char utc[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(utc, sizeof utc, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  const Machine m = machine();
  return {{"flashspark", m.version}, {"time", utc}, {"machine", to_json(m)}, {"cuda", to_json(gpu_facts())}};
}

void print_json(const Json &json) {
  // File and GPU names may hold arbitrary bytes: replace invalid UTF-8 instead of failing.
  const std::string text = json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  std::fwrite(text.data(), 1, text.size(), stdout);
}

void write_json(const Json &json, const std::string &path) {
  write_text(path, json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
}

}  // namespace flashspark::cli
