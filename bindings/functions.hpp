// The user's functions and block lists of an attention call from Python.
//
// They follow the arguments of signature.def, all of which are then given:
//
//   score_mod, mask_mod              handles that score_mod_create() and mask_mod_create() gave; 0: none
//   num_tensors, num_scalars         of score_mod, then of mask_mod: four integers
//   block_size_q, block_size_k       0 without lists
//   counts, indices                  of the blocks that ask mask_mod, then of those that do not: four tensors or None
//   for each captured tensor         the flashspark_dtype that it stands for (0: its own), and the tensor
//   each captured scalar             a float
#pragma once

#include <vector>

#include "args.hpp"
#include "signature.hpp"

namespace flashspark::ffi {

// Captured tensors and scalars, in the form of the last two, from argument `at` on.
class CapturedArguments {
 public:
  void read(Reader &args, int32_t at, int32_t tensors, int32_t scalars);
  const flashspark_captured_tensor *tensors() const { return tensors_.data(); }
  const double *scalars() const { return scalars_.data(); }

 private:
  std::vector<flashspark_captured_tensor> tensors_;
  std::vector<double> scalars_;
};

// Owns what the params point to.
class FunctionArguments {
 public:
  void read(Reader &args, flashspark_attention_params &params);
  int32_t end() const { return end_; }  // the index of what follows

 private:
  CapturedArguments captured_;
  int32_t end_ = attention::kCount;
};

flashspark_mod *mod_of(int64_t handle);
// A count of captured tensors or scalars, which an error calls `what`.
int32_t count_of(const Reader &args, int32_t index, const char *what, int32_t most);

int64_t create_mod(const std::string &graph, bool is_score);
void release_mod(int64_t handle);

}  // namespace flashspark::ffi
