// Runs attention problems (src/cases) through the GPU kernels on the emulator.
#pragma once

#include <functional>
#include <span>
#include <string>

#include "cases/cases.hpp"
#include "cuda/plan.hpp"
#include "emulator.hpp"

namespace flashspark::emulator {

struct Kernel {
  const Instance *instance;
  int32_t dtype;  // of q, k, v and out; for float8_e4m3, of k and v only
  Architecture tiles;
  void (*run)(const ForwardArguments &);
  // Of a kernel with the user's functions, whose `run` is NULL.
  const char *functions = nullptr;                 // their name in tests/support/named_graphs.hpp
  bool block_sparse = false, block_tiles = false;  // lists; those that are derived
  bool dropout = false;
  bool contiguous = false;  // takes no pages
  void (*run_functions)(const FunctionForwardArguments &) = nullptr;
};

// Every kernel that is linked in, ordered by instance, dtype and tile architecture.
std::span<const Kernel> kernels();
std::string name_of(const Kernel &kernel);

struct Registration {
  explicit Registration(const Kernel &kernel);
};

// A NULL kernel means the one that the plan chooses, among those that the build compiles.
struct Run {
  cases::Result result;
  std::string kernel;  // name of the kernel that ran; empty if there was no work
  Counters counters;
};
bool can_run(const cases::Problem &problem);
bool can_run(const Kernel &kernel, const cases::Problem &problem);
Run run(cases::Problem &problem, const Kernel *kernel, uint64_t seed);

// Runs the kernels only: the host does not read the lengths, and `result` stays empty. `spoil`, if given, may overwrite
// the scheduler metadata made for this problem; otherwise the seed decides which metadata the kernel gets.
using SpoilMetadata = std::function<void(std::span<int32_t> metadata)>;
Run execute(Params p, const Kernel *kernel, uint64_t seed, const SpoilMetadata &spoil = {});

// Runs the problem and compares it with the oracle. Returns an empty string on success, otherwise a description;
// emulator faults are included. `prepare`, if given, adds to a problem what a Case does not say: the user's functions.
using Prepare = std::function<void(cases::Problem &)>;
std::string check(const cases::Case &spec, const Kernel *kernel, uint64_t seed, const Prepare &prepare = {});

}  // namespace flashspark::emulator
