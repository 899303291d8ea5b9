#include "backward/functions.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backward/block_statuses.cuh"
#include "backward/clear.cuh"
#include "backward/round.cuh"
#include "emulator.hpp"
#include "graph/evaluate.hpp"
#include "random_functions.hpp"
#include "support/named_graphs.hpp"

namespace flashspark::emulator {
namespace {

// Of each dimension of a captured tensor, by its rank: smaller than some positions of the tests, so that indices are
// clamped, too.
constexpr int64_t kSizes[] = {1, 160, 150, 70};

void set(graph::DataType dtype, cases::Random &random, char *to) {
  const auto real = static_cast<float>(random.normal());
  const int64_t whole = random.below(6);
  const auto put = [to](auto value) { std::memcpy(to, &value, sizeof value); };
  switch (dtype) {
    case graph::DataType::f16:
      return put(float_to_f16(real));
    case graph::DataType::bf16:
      return put(float_to_bf16(real));
    case graph::DataType::f32:
      return put(real);
    case graph::DataType::f64:
      return put(double{real});
    case graph::DataType::boolean:
      return put(static_cast<uint8_t>(whole % 2));
    default:
      std::memcpy(to, &whole, static_cast<size_t>(graph::size_of(dtype)));
  }
}

}  // namespace

std::string to_string(const FunctionSpec &s) {
  std::string text = " functions " + s.functions;
  if (s.lists) {
    text += " lists " + std::to_string(s.wish.size_q) + " x " + std::to_string(s.wish.size_k) +
            (s.wish.per_batch ? " per batch" : "") + (s.wish.per_head ? " per head" : "") +
            (s.wish.masked ? " masked" : "") + (s.wish.full ? " full" : "");
  }
  return text;
}

int64_t ProblemFunctions::Captured::elements() const {
  int64_t count = 1;
  for (int32_t d = 0; d < tensor.rank; ++d) count *= tensor.shape[d];
  return count;
}

void ProblemFunctions::capture(const graph::Graph &graph, bool with_gradients, std::vector<Captured> &to) {
  for (int32_t n = 0; n < graph.num_tensors; ++n) {
    const graph::Capture &what = graph.captures[static_cast<size_t>(n)];
    Captured &c = to.emplace_back();
    c.tensor = {nullptr, static_cast<int32_t>(what.dtype), std::max(what.rank, 0), {}, {}};
    // Columns first, every other element; the gradient the other way round.
    int64_t stride = 2, gradient_stride = 3;
    for (int32_t d = 0; d < c.tensor.rank; ++d) {
      c.tensor.shape[d] = kSizes[std::min(c.tensor.rank, 3)] - d;
      c.tensor.strides[d] = stride, stride *= c.tensor.shape[d];
    }
    for (int32_t d = c.tensor.rank - 1; d >= 0; --d)
      c.gradient.strides[d] = gradient_stride, gradient_stride *= c.tensor.shape[d];
    const int64_t size = graph::size_of(what.dtype);
    c.data.resize(static_cast<size_t>(stride * size));
    for (int64_t at = 0; at < stride; ++at) set(what.dtype, random_, c.data.data() + at * size);
    c.tensor.data = c.data.data();
    if (!with_gradients || !graph::is_floating(what.dtype)) continue;
    c.memory = Guarded<float>(static_cast<size_t>(gradient_stride));
    std::fill(c.memory.begin(), c.memory.end(), NAN);
    c.gradient.data = c.memory.data();
    c.truth.assign(static_cast<size_t>(c.elements()), 0.0), c.allowed = c.truth;
  }
}

ProblemFunctions::ProblemFunctions(const FunctionSpec &spec, BackwardParams &p, uint64_t seed)
    : spec_(spec), random_(seed, 'f'), scalars_(graph::kMaxScalars, 0.25) {
  Params &f = p.forward;
  // Functions are made of graphs as they are written: what these capture counts, also what is no longer read.
  std::optional<graph::Graph> written_score, written_mask;
  if (spec.functions.starts_with("random_")) {
    const RandomFunctions random(std::stoull(spec.functions.substr(7)));
    written_score = random.score, written_mask = random.mask;
  } else {
    const test::NamedFunctions named = test::named(spec.functions);
    written_score = named.score(), written_mask = named.mask();
  }
  if (written_score) score_ = graph::simplified_function(*written_score);
  if (written_mask) mask_ = graph::simplified_function(*written_mask);
  const auto tensors_of = [](const std::vector<Captured> &from) {
    std::vector<graph::AuxTensor> tensors;
    for (const Captured &c : from) tensors.push_back(c.tensor);
    return tensors;
  };
  for (const auto *graph : {&score_, &mask_}) {
    for (size_t n = 0; *graph && n < (*graph)->nodes.size(); ++n) {
      const graph::Node &node = (*graph)->nodes[n];
      if (node.op == graph::Op::Scalar && node.type != graph::Type::f32)
        scalars_[static_cast<size_t>(node.number)] = 30;
    }
  }
  if (score_) {
    capture(*score_, spec.gradients, of_score_);
    score_tensors_ = tensors_of(of_score_);
    derivative_ = graph::derivative(*score_);
    for (const graph::LoadGradient &load : derivative_->loads) {
      graph::Graph place = *score_;
      const auto inputs = place.nodes[static_cast<size_t>(load.node)].inputs();
      const std::vector<int32_t> indices(inputs.begin(), inputs.end());
      place.results = indices;
      places_.push_back(std::move(place));
    }
    score_mod_ = std::make_unique<test::Function>(*written_score, true, bindings(score_tensors_));
    score_mod_->give(f);
    for (const Captured &c : of_score_) gradients_.push_back(c.gradient);
    p.dtensors = gradients_.data();
  }
  if (mask_) {
    capture(*mask_, false, of_mask_);
    mask_tensors_ = tensors_of(of_mask_);
    mask_mod_ = std::make_unique<test::Function>(*written_mask, false, bindings(mask_tensors_));
    mask_mod_->give(f);
  }
  if (spec.lists) {
    lists_ = std::make_unique<test::BlockLists>(f, spec.wish, seed);
    lists_->give(f);
  }
}

bool ProblemFunctions::keeps(const graph::Row &row, int32_t key) const {
  using Lists = test::BlockLists;
  auto status = Lists::kMasked;
  if (lists_ != nullptr) {
    const int64_t b = lists_->batch() > 1 ? row.b : 0, h = lists_->heads() > 1 ? row.h : 0;
    const int64_t list = (b * lists_->heads() + h) * lists_->blocks_q() + row.q_idx / spec_.wish.size_q;
    status = lists_->statuses()[static_cast<size_t>(list * lists_->blocks_k() + key / spec_.wish.size_k)];
  }
  if (status != Lists::kMasked) return status == Lists::kFull;
  return !mask_ || graph::evaluate(*mask_, bindings(mask_tensors_), row, key, 0).integer != 0;
}

double ProblemFunctions::modified(const graph::Row &row, int32_t key, double score, double &slope) const {
  if (!score_) return score;
  const graph::Bindings b = bindings(score_tensors_);
  slope = graph::evaluate(derivative_->graph, b, row, key, score, 0).value;
  return graph::evaluate(*score_, b, row, key, score).value;
}

void ProblemFunctions::add(const graph::Row &row, int32_t key, double score, double ds, double noise) {
  if (!score_) return;
  const graph::Bindings b = bindings(score_tensors_);
  for (size_t n = 0; n < places_.size(); ++n) {
    Captured &c = of_score_[static_cast<size_t>(derivative_->loads[n].tensor)];
    if (c.truth.empty()) continue;
    int64_t at = 0;
    for (int32_t d = 0; d < c.tensor.rank; ++d) {
      int64_t index = graph::evaluate(places_[n], b, row, key, score, d).integer;
      if (index < 0) index += c.tensor.shape[d];
      at = at * c.tensor.shape[d] + std::clamp<int64_t>(index, 0, c.tensor.shape[d] - 1);
    }
    const double slope = graph::evaluate(derivative_->graph, b, row, key, score, 1 + static_cast<int32_t>(n)).value;
    const double term = ds == 0 ? 0 : ds * slope;
    c.truth[static_cast<size_t>(at)] += term;
    c.allowed[static_cast<size_t>(at)] += std::fabs(term) * 0x1p-14 + noise * std::fabs(slope);
  }
}

std::string ProblemFunctions::compare() const {
  for (size_t n = 0; n < of_score_.size(); ++n) {
    const Captured &c = of_score_[n];
    for (size_t element = 0; element < c.truth.size(); ++element) {
      int64_t at = 0;
      auto left = static_cast<int64_t>(element);
      for (int32_t d = c.tensor.rank - 1; d >= 0; --d)
        at += left % c.tensor.shape[d] * c.gradient.strides[d], left /= c.tensor.shape[d];
      const double x = double{c.gradient.data[at]}, y = c.truth[element];
      if (std::fabs(x - y) <= c.allowed[element] + 1e-6) continue;
      return "dtensors[" + std::to_string(n) + "], element " + std::to_string(element) + ": " + std::to_string(x) +
             ", should be " + std::to_string(y) + " within " + std::to_string(c.allowed[element]);
    }
  }
  return {};
}

template <class Kernel>
void run_small(const cuda::Launch &shape, uint64_t seed, Kernel kernel) {
  if (shape.grid[0] == 0) return;
  LaunchOptions options;
  std::copy_n(shape.grid, 3, options.grid);
  options.threads = shape.threads, options.shared_bytes = shape.shared_bytes, options.seed = seed;
  launch(options, kernel);
}
void ProblemFunctions::prepare(const cuda::BackwardFunctionPlan &plan, uint64_t seed) {
  run_small(plan.clear, seed, [&] { clear_gradients(plan.clear_arguments); });
  run_small(plan.make_blocks, seed, [&] { find_block_statuses(plan.block_arguments); });
}
void ProblemFunctions::finish(const cuda::BackwardFunctionPlan &plan, uint64_t seed) {
  run_small(plan.round, seed, [&] { round_gradients(plan.round_arguments); });
}

}  // namespace flashspark::emulator
