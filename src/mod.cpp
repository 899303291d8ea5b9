#include "mod.hpp"

#include <map>
#include <mutex>

#include "check.hpp"
#include "dtype.hpp"
#include "error.hpp"
#include "graph/cuda_source.hpp"

namespace flashspark {
namespace {

static_assert(graph::kMaxTensors == FLASHSPARK_MAX_CAPTURED_TENSORS &&
              graph::kMaxScalars == FLASHSPARK_MAX_CAPTURED_SCALARS && graph::kMaxRank == FLASHSPARK_MAX_CAPTURED_RANK);

constexpr int64_t kBlockStep = 16;  // sizes of blocks are multiples of it

// Numbers for texts, from 1 on; a text keeps its number for good.
uint64_t id_of(const std::string &text) {
  static std::mutex mutex;
  static std::map<std::string, uint64_t> ids;
  const std::lock_guard lock(mutex);
  return ids.try_emplace(text, ids.size() + 1).first->second;
}

// The graph's type of a captured tensor; throws for one that it has not.
// The names of a function's fields. Errors take them from here, so that a call without errors makes no text.
struct FunctionNames {
  const char *function, *mod, *num_tensors, *num_scalars, *tensors, *scalars;
};
constexpr FunctionNames kScoreNames = {
    "score_mod",         "score_mod.mod",    "score_mod.num_tensors", "score_mod.num_scalars",
    "score_mod.tensors", "score_mod.scalars"};
constexpr FunctionNames kMaskNames = {
    "mask_mod", "mask_mod.mod", "mask_mod.num_tensors", "mask_mod.num_scalars", "mask_mod.tensors", "mask_mod.scalars"};

struct ListNames {
  const char *counts, *indices, *width;
};
constexpr ListNames kMaskedNames = {"masked_blocks.counts", "masked_blocks.indices", "masked_blocks.width"};
constexpr ListNames kFullNames = {"full_blocks.counts", "full_blocks.indices", "full_blocks.width"};

// The entries of one row of a list, on the CPU: of sequence b, query head h and query block q.
void check_row(const ListNames &names, const flashspark_block_list &list, int64_t b, int64_t h, int64_t q,
               int64_t num_blocks) {
  const auto place = [&](const char *name) {
    return std::string(name) + "[" + std::to_string(b) + ", " + std::to_string(h) + ", " + std::to_string(q);
  };
  const auto [count, row] = row_of(list, b, h, q);
  if (count < 0 || count > list.width)
    fail(place(names.counts) + "]", int64_t{count}, "must be from 0 to the width, " + std::to_string(list.width));
  for (int32_t n = 0; n < count; ++n) {
    if (row[n] < 0 || row[n] >= num_blocks)
      fail(place(names.indices) + ", " + std::to_string(n) + "]", int64_t{row[n]},
           "must name a key block, 0 to " + std::to_string(num_blocks - 1));
  }
}

void check_list(const Params &p, const ListNames &names, const flashspark_block_list &list) {
  if (list.counts == nullptr) return;
  check::in_range(names.width, list.width, 0, INT32_MAX);
  if (list.width > 0) check::present(names.indices, list.indices, "must be given with counts");
  if (p.device != FLASHSPARK_CPU) return;
  const int64_t num_blocks = key_blocks(p);
  for (int64_t b = 0; b < p.block_batch; ++b) {
    for (int64_t h = 0; h < p.block_heads; ++h) {
      for (int64_t q = 0; q < p.num_blocks_q; ++q) check_row(names, list, b, h, q, num_blocks);
    }
  }
}

void check_block_size(const char *name, int64_t size) {
  if (size <= 0 || size % kBlockStep != 0 || size > INT32_MAX) fail(name, size, "must be a multiple of 16, above 0");
}

void check_blocks(const Params &p) {
  if (!has_block_lists(p)) return;
  check_block_size("block_size_q", p.block_size_q);
  check_block_size("block_size_k", p.block_size_k);
  if (p.block_batch != 1 && p.block_batch != p.num_seqs)
    fail("block_batch", p.block_batch, "must be 1 or num_seqs, " + std::to_string(p.num_seqs));
  if (p.block_heads != 1 && p.block_heads != p.num_heads_q)
    fail("block_heads", p.block_heads, "must be 1 or num_heads_q, " + std::to_string(p.num_heads_q));
  const int64_t blocks = (p.max_seqlen_q + p.block_size_q - 1) / p.block_size_q;
  check::in_range("num_blocks_q", p.num_blocks_q, blocks, INT32_MAX);
  check_list(p, kMaskedNames, p.masked_blocks);
  check_list(p, kFullNames, p.full_blocks);
}

}  // namespace
}  // namespace flashspark

flashspark_mod::flashspark_mod(flashspark::graph::Graph simple, uint64_t number, bool makes_scores)
    : graph(std::move(simple)), program(graph), id(number), is_score(makes_scores) {}

int32_t flashspark_mod::row_words(bool wide) const {
  Words &words = words_[wide ? 1 : 0];
  std::call_once(words.once, [&] {
    words.count = flashspark::graph::cuda_source(is_score ? &graph : nullptr, is_score ? nullptr : &graph,
                                                 {.wide_positions = wide})
                      .row_words;
  });
  return words.count;
}

const flashspark::ScoreDerivative &flashspark_mod::derivative() const {
  std::call_once(derivative_once_, [&] { derivative_ = std::make_unique<flashspark::ScoreDerivative>(graph); });
  return *derivative_;
}

namespace flashspark {

ScoreDerivative::ScoreDerivative(const graph::Graph &score) : function(graph::derivative(score)) {
  const auto compile = [](const graph::Graph &from) {
    std::vector<graph::Program> programs;
    graph::Graph one = from;
    for (const int32_t result : from.results) {
      one.results = {result};
      programs.emplace_back(one);
    }
    return programs;
  };
  results = compile(function.graph);
  for (const graph::LoadGradient &load : function.loads) {
    graph::Graph place = score;
    const std::span<const int32_t> inputs = score.nodes[static_cast<size_t>(load.node)].inputs();
    place.results.assign(inputs.begin(), inputs.end());
    indices.push_back(compile(place));
    places.push_back(std::move(place));
  }
}

graph::DataType captured_type(int32_t dtype) {
  switch (dtype) {
    case FLASHSPARK_FLOAT32:
      return graph::DataType::f32;
    case FLASHSPARK_FLOAT16:
      return graph::DataType::f16;
    case FLASHSPARK_BFLOAT16:
      return graph::DataType::bf16;
    case FLASHSPARK_FLOAT64:
      return graph::DataType::f64;
    case FLASHSPARK_BOOL:
      return graph::DataType::boolean;
    case FLASHSPARK_UINT8:
      return graph::DataType::u8;
    case FLASHSPARK_INT8:
      return graph::DataType::i8;
    case FLASHSPARK_INT16:
      return graph::DataType::i16;
    case FLASHSPARK_INT32:
      return graph::DataType::i32;
    case FLASHSPARK_INT64:
      return graph::DataType::i64;
    default:
      fail("dtype", int64_t{dtype}, "is no type of a captured tensor");
  }
}

flashspark_mod *make_mod(const char *text, bool is_score) {
  if (text == nullptr) fail("graph", "NULL", "must be the text of a graph");
  graph::Graph parsed = graph::parse(text);
  const std::string wanted = is_score ? "f32, as a score function's is" : "bool, as a mask function's is";
  if (parsed.results.size() != 1)
    fail("graph", static_cast<int64_t>(parsed.results.size()), "must return one node, whose type is " + wanted);
  const graph::Node &result = parsed.nodes[static_cast<size_t>(parsed.results[0])];
  if (result.type != (is_score ? graph::Type::f32 : graph::Type::boolean))
    fail("graph", graph::name(result.type), "is the type of the result, which must be " + wanted);
  for (const graph::Node &node : parsed.nodes) {
    if (!is_score && node.op == graph::Op::Score) fail("graph", "score", "is no input of a mask function");
  }
  graph::Graph simple = graph::simplified_function(parsed);
  const uint64_t id = id_of((is_score ? "score " : "mask ") + graph::to_text(simple));
  return new flashspark_mod(std::move(simple), id, is_score);
}

FunctionBindings::FunctionBindings(const flashspark_function &function) {
  if (function.mod == nullptr) return;
  scalars_ = {function.scalars, static_cast<size_t>(function.num_scalars)};
  tensors_.reserve(static_cast<size_t>(function.num_tensors));
  for (int32_t n = 0; n < function.num_tensors; ++n) {
    const flashspark_captured_tensor &from = function.tensors[n];
    check::in_range("tensor rank", from.rank, 0, FLASHSPARK_MAX_CAPTURED_RANK);
    graph::AuxTensor to{from.data, static_cast<int32_t>(captured_type(from.dtype)), from.rank, {}, {}};
    for (int32_t d = 0; d < from.rank; ++d) {
      to.shape[d] = from.shape[d];
      to.strides[d] = from.strides[d];
    }
    tensors_.push_back(to);
  }
}

AskedFor asked_for(const BlockMaskParams &p) {
  const auto reads = [&](graph::Op op) {
    const auto &nodes = p.mask_mod.mod->graph.nodes;
    return std::any_of(nodes.begin(), nodes.end(), [&](const graph::Node &node) { return node.op == op; });
  };
  return {reads(graph::Op::B) ? p.num_seqs : 1, reads(graph::Op::H) ? p.num_heads : 1};
}

void check_function(const flashspark_function &function, bool is_score) {
  if (function.mod == nullptr) return;
  const FunctionNames &names = is_score ? kScoreNames : kMaskNames;
  if (function.mod->is_score != is_score)
    fail(names.mod, is_score ? "a mask function" : "a score function",
         is_score ? "must be made by flashspark_score_mod_create()" : "must be made by flashspark_mask_mod_create()");
  check::in_range(names.num_tensors, function.num_tensors, 0, graph::kMaxTensors);
  check::in_range(names.num_scalars, function.num_scalars, 0, graph::kMaxScalars);
  if (function.num_tensors > 0) check::present(names.tensors, function.tensors, "must point to them");
  if (function.num_scalars > 0) check::present(names.scalars, function.scalars, "must point to them");
  try {
    graph::check(function.mod->graph, FunctionBindings(function).get());
  } catch (const Error &error) {
    throw Error(error.status(), std::string(names.function) + ": " + error.what());
  }
}

void validate_functions(const Params &p) {
  check_function(p.score_mod, true);
  check_function(p.mask_mod, false);
  check_blocks(p);
}

}  // namespace flashspark
