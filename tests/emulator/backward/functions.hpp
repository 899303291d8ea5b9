// The user's functions and block lists of a backward problem: what they capture, where its gradients go, and the truth
// about them in double precision.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda/backward.hpp"
#include "graph/derivative.hpp"
#include "guarded.hpp"
#include "support/functions.hpp"

namespace flashspark::emulator {

struct FunctionSpec {
  std::string functions = "none";  // tests/support/named_graphs.hpp, or random_7 (random_functions.hpp)
  bool lists = false;
  bool gradients = true;  // of captured tensors
  test::BlockListWish wish;
};
std::string to_string(const FunctionSpec &spec);

class ProblemFunctions {
 public:
  // Of a problem whose sizes are known; its functions, lists and dtensors become those of this object.
  ProblemFunctions(const FunctionSpec &spec, BackwardParams &p, uint64_t seed);

  // Whether the lists and the mask keep a key.
  bool keeps(const graph::Row &row, int32_t key) const;
  // What score_mod makes of a score, and the derivative of that.
  double modified(const graph::Row &row, int32_t key, double score, double &slope) const;
  // ds: the gradient of the modified score; `noise`: how wrong it may be.
  void add(const graph::Row &row, int32_t key, double score, double ds, double noise);

  // What is wrong with the gradients of captured tensors; empty: nothing.
  std::string compare() const;

  // Runs the kernels that go before the main one; and behind it.
  static void prepare(const cuda::BackwardFunctionPlan &plan, uint64_t seed);
  static void finish(const cuda::BackwardFunctionPlan &plan, uint64_t seed);

 private:
  // The memory of one captured tensor, and of its gradient.
  struct Captured {
    std::vector<char> data;
    graph::AuxTensor tensor;
    flashspark_captured_gradient gradient{};
    Guarded<float> memory;
    std::vector<double> truth, allowed;

    int64_t elements() const;
  };
  void capture(const graph::Graph &graph, bool with_gradients, std::vector<Captured> &to);
  graph::Bindings bindings(const std::vector<graph::AuxTensor> &tensors) const { return {tensors, scalars_}; }

  FunctionSpec spec_;
  cases::Random random_;
  std::optional<graph::Graph> score_, mask_;
  std::optional<graph::Derivative> derivative_;
  std::vector<graph::Graph> places_;  // for each of its loads, the indices
  std::vector<Captured> of_score_, of_mask_;
  std::vector<graph::AuxTensor> score_tensors_, mask_tensors_;
  std::vector<double> scalars_;
  std::vector<flashspark_captured_gradient> gradients_;
  std::unique_ptr<test::Function> score_mod_, mask_mod_;
  std::unique_ptr<test::BlockLists> lists_;
};

}  // namespace flashspark::emulator
