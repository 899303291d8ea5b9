// One table of implementations and operations. A problem asks for features, and the first implementation in the table
// that has them all runs it. The choice, and every refusal, prints itself.
#pragma once

#include <span>
#include <string>

#include "problem.hpp"
#include "scratch.hpp"

namespace flashspark {

using FeatureSet = uint64_t;

// An implementation's backward pass. run == NULL: it has none.
struct BackwardPass {
  FeatureSet features = 0;
  int64_t max_head_dim = 0;
  std::string (*plan)(const BackwardParams &p) = nullptr;         // as of Implementation
  std::string (*unsupported)(const BackwardParams &p) = nullptr;  // as of Implementation
  void (*run)(const BackwardParams &p, const ScratchSource &scratch) = nullptr;
  size_t (*workspace)(const BackwardParams &p) = nullptr;  // bytes that run() needs
};

struct Implementation {
  const char *name;
  const char *description;
  flashspark_device device;
  FeatureSet features;
  int64_t max_head_dim;
  std::string (*detail)(const Params &p);  // what it runs on here: "AVX2, 2 threads"
  std::string (*plan)(const Params &p);    // what it would launch, in lines; NULL: nothing to tell
  // Why this machine or build cannot run it on this device, and what of a problem on its own device it cannot take
  // although it has the features; empty: nothing. NULL: never anything.
  std::string (*unavailable)(int32_t device_index);
  std::string (*unsupported)(const Params &p);

  // The operations, for params that their validate() has passed. NULL: the implementation lacks it.
  void (*forward)(const Params &p, const ScratchSource &scratch);
  size_t (*workspace)(const Params &p);  // bytes that forward() needs
  BackwardPass backward;
  void (*append)(const AppendParams &p);
  void (*schedule)(const Params &p);
  int64_t (*schedule_size)(const Params &p);  // elements that schedule() writes
  void (*block_mask)(const BlockMaskParams &p);
};

// Best first.
std::span<const Implementation> implementations();
std::string implementation_names();  // "cuda, cpu-engine, cpu-reference"

// The implementation whose forward() runs the problem: the one that params or FLASHSPARK_FORCE_IMPLEMENTATION name, or
// the best. Throws Error (UNSUPPORTED) with what is required, what each candidate lacks, and the device.
const Implementation &choose(const Params &p);
// The same for its gradients, which its `backward` gives.
const Implementation &choose_backward(const BackwardParams &p);

// The best with the operation on the problem's device: any name asks for attention, not for these.
const Implementation &choose_append(const AppendParams &p);
const Implementation &choose_schedule(const Params &p);
const Implementation &choose_block_mask(const BlockMaskParams &p);

// The choice of choose() as text: one line an implementation, and the plan of the chosen one. Never throws for an
// unsupported problem.
std::string explain(const Params &p);
std::string explain(const BackwardParams &p);

}  // namespace flashspark
