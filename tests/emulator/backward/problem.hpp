// Backward problems with their memory, their truth in double precision, and the GPU kernels that compute them on the
// emulator.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <random>
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
  bool block_sparse = false, in_turns = false, native = false, exact_sums = false;
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
  bool alibi = false, alibi_per_seq = false;
  int64_t rel_extent = 0;  // 0: no rel_logits
  int32_t rel_dtype = FLASHSPARK_FLOAT32;
  int32_t prefix_mode = FLASHSPARK_PREFIX_NONE;
  bool prefix_clamp_window = false;
  int32_t rswa_window = 0;
  int64_t attention_chunk = 0;
  bool sinks = false, dlse = false;
  bool without_keys = false;  // every third row has an lse of -inf
  bool wanted_q = true, wanted_k = true, wanted_v = true, wanted_biases = true;
  bool heads_first = false;  // tensors lie (B, H, T, D)
  float spread = 1.0f;       // of scores: larger ones are peaked
  bool deterministic = false;
  int32_t sm_count = 2;  // with many SMs the query heads of a group are of several CTAs
  std::optional<FunctionSpec> functions{};
};
std::string to_string(const BackwardSpec &spec);
bool can_run(const BackwardKernel &kernel, const BackwardSpec &spec);

class BackwardProblem {
 public:
  BackwardProblem(const BackwardSpec &spec, uint64_t seed);
  BackwardParams params{};

  // Runs all kernels; `kernel` is the main one, with so many passes of exact sums if there are any. Throws Fault.
  Counters run(const BackwardKernel &kernel, uint64_t seed, int64_t passes = 1);

  // Some of the arrays that kernels read on the device then hold anything.
  void spoil_metadata(std::mt19937_64 &rng);

  // What is wrong with the results; empty: nothing.
  std::string compare(const BackwardKernel &kernel) const;

 private:
  struct Tensor;
  // What a result may be: the truth, how much it may differ by its terms' roundings to 16 bits, and by what else.
  struct Truth {
    std::vector<double> value, allowed, noise;
    void resize(int64_t count);
    void add(int64_t at, double x, double step, double error = 0);
  };
  void make_memory(uint64_t seed);
  void make_biases(uint64_t seed);
  void make_masks(uint64_t seed);
  void compute_truth();
  void add_row(const Sequence &sequence, int64_t i, int64_t h);  // to the truth, and its out and lse
  void spare_unread_biases();
  flashspark_tensor tensor(Guarded<uint16_t> &memory, int64_t batch, int64_t tokens, int64_t heads, int64_t width);
  std::string compare(const char *name, const flashspark_tensor &got, const Truth &truth, int64_t heads, int64_t width,
                      bool of_keys, int roundings) const;
  std::string compare(const char *name, const Guarded<float> &got, const Truth &truth, int roundings) const;
  double step() const { return spec_.dtype == FLASHSPARK_BFLOAT16 ? 1.0 / 256 : 1.0 / 2048; }

  BackwardSpec spec_;
  Guarded<uint16_t> q_, k_, v_, out_, dout_, dq_, dk_, dv_;
  Guarded<float> lse_, dlse_, sinks_, dsinks_, slopes_, dslopes_, drel_;
  Guarded<char> rel_;  // of rel_dtype
  Guarded<int32_t> cu_q_, cu_k_, used_q_, used_k_, causal_, ranges_, prefixes_;
  Truth truth_q_, truth_k_, truth_v_, truth_sinks_, truth_slopes_, truth_rel_;
  std::unique_ptr<ProblemFunctions> functions_;
  int64_t max_q_ = 0, max_k_ = 0;
};

// Runs a problem through a kernel and compares; the text of what is wrong, empty: nothing.
std::string check_backward(const BackwardSpec &spec, const BackwardKernel &kernel, uint64_t seed,
                           Counters *counters = nullptr);

}  // namespace flashspark::emulator
