#include "cli/flex_functions.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

namespace flashspark::cli {
namespace {

std::string graph(const std::string &lines) {
  return "flashspark-graph 1\n" + lines;
}

}  // namespace

std::vector<FlexFunction> flex_functions(int64_t width) {
  using enum FlexKind;
  const std::string causal = "q_idx\nkv_idx\nge 0 1\n", number = fmt::format("const i32 {}\n", width);
  const auto sized = [&](const char *name) { return fmt::format("{}-{}", name, width); };
  return {
      {.name = "none", .kind = none, .graph = {}, .width = 0},
      {.name = "causal", .kind = mask, .graph = graph(causal + "return 2\n"), .width = 0},
      {.name = sized("window"),
       .kind = mask,
       .graph = graph(causal + number + "sub 0 1\nle 4 3\nand 2 5\nreturn 6\n"),
       .width = width},
      {.name = sized("documents"),
       .kind = mask,
       .graph = graph(causal + number + "floordiv 0 3\nfloordiv 1 3\neq 4 5\nand 2 6\nreturn 7\n"),
       .width = width},
      {.name = sized("prefix"),
       .kind = mask,
       .graph = graph(causal + number + "lt 1 3\nor 2 4\nreturn 5\n"),
       .width = width},
      {.name = "ALiBi",
       .kind = score,
       .graph = graph("score\nh\nq_idx\nkv_idx\nload 0 f32 1 1\nsub 3 2\nto_f32 5\nmul 4 6\nadd 0 7\nreturn 8\n"),
       .width = 0,
       .slopes = true},
      {.name = "relative",
       .kind = score,
       .graph = graph("score\nq_idx\nkv_idx\nsub 1 2\nto_f32 3\nadd 0 4\nreturn 5\n"),
       .width = 0},
      {.name = "softcap-30",
       .kind = score,
       .graph = graph("score\nconst f32 0x1.ep+4\ndiv 0 1\ntanh 2\nmul 3 1\nreturn 4\n"),
       .width = 0},
  };
}

KeptKeys kept_keys(const FlexFunction &function, int64_t row, int64_t tokens) {
  const int64_t end = row + 1, width = function.width;
  if (function.name.starts_with("window")) return {std::max<int64_t>(0, row - width), end};
  if (function.name.starts_with("documents")) return {row / width * width, end};
  if (function.name.starts_with("prefix")) return {0, std::min(tokens, std::max(end, width))};
  return {0, end};
}

double kept_pairs(const FlexFunction &function, int64_t tokens) {
  int64_t pairs = 0;
  for (int64_t row = 0; row < tokens; ++row) {
    const KeptKeys keys = kept_keys(function, row, tokens);
    pairs += keys.end - keys.begin;
  }
  return static_cast<double>(pairs);
}

FlexLists::FlexLists(const FlexFunction &function, int64_t tokens) : blocks((tokens + kFlexBlock - 1) / kFlexBlock) {
  for (List *list : {&masked, &full}) {
    list->counts.resize(static_cast<size_t>(blocks));
    list->indices.resize(static_cast<size_t>(blocks * blocks));
  }
  for (int64_t row = 0; row < blocks; ++row) {
    const int64_t last = std::min(tokens, (row + 1) * kFlexBlock) - 1;
    const KeptKeys of_first = kept_keys(function, row * kFlexBlock, tokens),
                   of_last = kept_keys(function, last, tokens);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kFlexBlock, end = std::min(tokens, begin + kFlexBlock);
      if (begin >= of_last.end || end <= of_first.begin) continue;
      List &list = begin >= of_last.begin && end <= of_first.end ? full : masked;
      list.indices[static_cast<size_t>(row * blocks + list.counts[static_cast<size_t>(row)]++)] =
          static_cast<int32_t>(block);
    }
  }
}

Mod make_mod_of(const FlexFunction &function) {
  flashspark_mod *mod = nullptr;
  const auto create = function.kind == FlexKind::score ? flashspark_score_mod_create : flashspark_mask_mod_create;
  if (create(function.graph.c_str(), &mod) != FLASHSPARK_OK) throw std::runtime_error(flashspark_last_error());
  return Mod(mod);
}

}  // namespace flashspark::cli
