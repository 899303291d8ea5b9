// The functions that bench flex measures: their graphs, and which keys a mask keeps.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flashspark/flashspark.h"

namespace flashspark::cli {

enum class FlexKind {
  none,   // the kernel without functions, causal
  mask,   // a mask function and lists of blocks
  score,  // a score function, causal
};

struct FlexFunction {
  std::string name;
  FlexKind kind = FlexKind::none;
  std::string graph;    // text (docs/design/score-graph.md); empty: none
  int64_t width = 0;    // of a window, a document or a prefix
  bool slopes = false;  // reads a float32 tensor (heads,)
};

// none, causal, window, documents, prefix, ALiBi, relative and softcap. width: of a window, a document, a prefix.
std::vector<FlexFunction> flex_functions(int64_t width);

// Keys [begin, end) that a row keeps. Neither end is smaller for a later row.
struct KeptKeys {
  int64_t begin, end;
};
KeptKeys kept_keys(const FlexFunction &function, int64_t row, int64_t tokens);

// (row, key) pairs that a head keeps of `tokens` rows and keys.
double kept_pairs(const FlexFunction &function, int64_t tokens);

// Which blocks of kFlexBlock rows and keys a mask keeps in part, and which wholly.
constexpr int64_t kFlexBlock = 128;
struct FlexLists {
  FlexLists(const FlexFunction &function, int64_t tokens);

  struct List {
    std::vector<int32_t> counts, indices;  // (blocks), (blocks, blocks)
  };
  int64_t blocks;
  List masked, full;
};

// A flashspark_mod. Throws std::runtime_error if the library refuses the text.
struct ReleaseMod {
  void operator()(flashspark_mod *mod) const { flashspark_mod_release(mod); }
};
using Mod = std::unique_ptr<flashspark_mod, ReleaseMod>;
Mod make_mod_of(const FlexFunction &function);

}  // namespace flashspark::cli
