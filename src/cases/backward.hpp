// Gradients of the problems of cases.hpp: a Case's forward result by the oracle, random dout and dlse, and memory for
// every gradient that it has.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "cases/cases.hpp"

namespace flashspark::cases {

// Whether every part of a Case has gradients: no cache, no fp8. Cases that differ from another one only in num_splits
// are left out.
bool has_gradients(const Case &spec);

// Of rows in use, as float: (rows, Hq, D), (keys, Hkv, D | Dv), (Hq), (rows, Hq, rel_extent), (Hq) or (B, Hq). Empty
// where not wanted.
struct Gradients {
  flashspark_status status = FLASHSPARK_OK;
  std::string error;  // flashspark_last_error() when status != FLASHSPARK_OK
  std::vector<float> dq, dk, dv, dsinks, drel, dalibi;
  std::string trespass;  // empty, or what was written to a gap, or is not 0 in a row out of use
};

class BackwardProblem {
 public:
  // out and lse have q's dtype and are there, whatever the Case says.
  // forward_by: the implementation that computes them.
  explicit BackwardProblem(const Case &spec, const char *forward_by = "cpu-reference");
  BackwardProblem(BackwardProblem &&) = default;

  Problem forward;
  // Ready to run. A test may change any field.
  flashspark_attention_backward_params params;

  // Poisons all gradients, runs, and reads them back.
  Gradients run(const char *implementation, int num_threads = 0);
  // Runs without poisoning or reading back, for timing.
  flashspark_status launch(const char *implementation, int num_threads);
  void poison();
  Gradients result() const;  // reads the gradients back
  // As of Problem.
  std::vector<std::span<std::byte>> memory();
  std::vector<std::span<std::byte>> written_memory();

  double flops() const { return 2.5 * forward.flops(); }  // five products instead of two
  double bytes() const { return 2 * forward.bytes(); }    // each of its rows beside its gradient
  // Largest |dout| of query head h's row i of sequence b, and its norm; |dlse| of it.
  double largest_dout(int64_t b, int64_t i, int64_t h) const;
  double norm_dout(int64_t b, int64_t i, int64_t h) const;
  double dlse(int64_t b, int64_t i, int64_t h) const;
  // The sum of each key's probabilities in all rows that have it, by the oracle: (keys, Hkv).
  std::vector<float> key_mass();

 private:
  int64_t q_at(const flashspark_tensor &t, int64_t b, int64_t i, int64_t h) const;
  int64_t k_at(const flashspark_tensor &t, int64_t b, int64_t j, int64_t h) const;
  void fill();
  void read(const Buffer &buffer, const flashspark_tensor &t, bool of_queries, int64_t width, Gradients &to,
            std::vector<float> &values) const;
  void check_gaps(const Buffer &buffer, const std::vector<bool> &written, const char *name, Gradients &to) const;

  Buffer dout_, dlse_, dq_, dk_, dv_, dsinks_, drel_, dalibi_, workspace_;
};

// The sum of |P Z| |dout| (dv) and of |dS| |k| and |dS| |q| (dq, dk) for every element, by the oracle's formula: what
// rounding P and dS can move, in parts. The other gradients are empty.
Gradients magnitudes(const BackwardProblem &problem);

// How far `got` is from the oracle's `expected`, in parts of what rounding explains; see compare_backward.cpp.
struct GradientComparison {
  double ratio = 0;      // largest |error| / bound of all gradients: > 1 fails
  std::string worst;     // where
  double max_error = 0;  // of all gradients
  double rms_error = 0;
  double bound = 0;  // where the ratio is largest
  bool passed() const { return ratio <= 1.0; }
};
// With `magnitudes` the implementation may round P and dS to q's dtype, as tensor cores ask for; cut_sums: these also
// cut sums off instead of rounding them.
GradientComparison compare(BackwardProblem &problem, const Gradients &got, const Gradients &expected,
                           const Gradients *magnitudes = nullptr, bool cut_sums = true);
// The same, with what `implementation` may do on this machine.
GradientComparison compare_of(const std::string &implementation, BackwardProblem &problem, const Gradients &got,
                              const Gradients &expected);

}  // namespace flashspark::cases
