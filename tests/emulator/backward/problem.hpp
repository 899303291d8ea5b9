// Backward problems with their memory, their truth in double precision, and the GPU kernels that compute them on the
// emulator.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backward/functions.hpp"
#include "cuda/backward.hpp"
#include "emulator.hpp"
#include "guarded.hpp"

namespace flashspark::emulator {

struct BackwardKernel {
  const BackwardInstance *instance;
  int32_t dtype;
  Architecture tiles;
  void (*run)(const BackwardArguments &);
  // Of kernels with functions:
  const char *functions = nullptr;  // their names in tests/support/named_graphs.hpp
  bool block_sparse = false;
  void (*run_functions)(const FunctionBackwardArguments &) = nullptr;
};
std::span<const BackwardKernel> backward_kernels();
std::string name_of(const BackwardKernel &kernel);
struct BackwardRegistration {
  explicit BackwardRegistration(const BackwardKernel &kernel);
};

struct BackwardSpec {
  int32_t dtype = FLASHSPARK_BFLOAT16;
  int64_t head_dim = 64, head_dim_v = 64, heads_q = 1, heads_kv = 1;
  // Of each sequence: query tokens and keys; without varlen all sequences have as much memory as the longest.
  std::vector<int32_t> tokens = {64}, keys = {128};
  bool varlen_q = false, varlen_k = false;  // else with seqused where lengths differ
  bool unused_rows = false;                 // varlen: memory has more rows than are in use (seqused_q, seqused_k)
  bool causal = false;
  bool causal_per_seq = false;  // every second sequence
  int64_t window_left = -1, window_right = -1;
  float softcap = 0, dropout_p = 0;
  bool sinks = false, dlse = false;
  bool wanted_q = true, wanted_k = true, wanted_v = true;
  bool heads_first = false;  // tensors lie (B, H, T, D)
  float spread = 1.0f;       // of scores: larger ones are peaked
  std::optional<FunctionSpec> functions;
};
std::string to_string(const BackwardSpec &spec);

class BackwardProblem {
 public:
  BackwardProblem(const BackwardSpec &spec, uint64_t seed);
  BackwardParams params{};

  // Runs all kernels; `kernel` is the main one. Throws Fault.
  Counters run(const BackwardKernel &kernel, uint64_t seed);

  // What is wrong with the results; empty: nothing.
  std::string compare(const BackwardKernel &kernel) const;

 private:
  struct Tensor;
  // What a result may be: the truth, and how much it may differ.
  struct Truth {
    std::vector<double> value, allowed;
  };
  void make_memory(uint64_t seed);
  void compute_truth();
  flashspark_tensor tensor(Guarded<uint16_t> &memory, int64_t batch, int64_t tokens, int64_t heads, int64_t width);
  std::string compare(const char *name, const flashspark_tensor &got, const Truth &truth, int64_t heads, int64_t width,
                      bool of_keys, int roundings) const;

  BackwardSpec spec_;
  Guarded<uint16_t> q_, k_, v_, out_, dout_, dq_, dk_, dv_;
  Guarded<float> lse_, dlse_, sinks_, dsinks_;
  Guarded<int32_t> cu_q_, cu_k_, used_q_, used_k_, causal_;
  Truth truth_q_, truth_k_, truth_v_, truth_sinks_;
  std::unique_ptr<ProblemFunctions> functions_;
  int64_t max_q_ = 0, max_k_ = 0;
};

// Runs a problem through a kernel and compares; the text of what is wrong, empty: nothing.
std::string check_backward(const BackwardSpec &spec, const BackwardKernel &kernel, uint64_t seed,
                           Counters *counters = nullptr);

}  // namespace flashspark::emulator
