// Which implementation runs a problem. Each one declares its features; a problem asks for features; the first in the
// table that has them all runs. The choice, and every refusal, prints itself.
#pragma once

#include <span>
#include <string>

#include "problem.hpp"

namespace flashspark {

using FeatureSet = uint64_t;

struct Implementation {
  const char *name;
  const char *description;
  flashspark_device device;
  FeatureSet features;
  int64_t max_head_dim;
  std::string (*detail)(const Params &p);       // what it runs on here: "AVX2, 2 threads"
  void (*forward)(const Params &p);             // params have passed validate()
  size_t (*workspace)(const Params &p);         // bytes
  std::string (*unavailable)(const Params &p);  // what this machine or build lacks, of a problem of its own device
};

// Best first.
std::span<const Implementation> implementations();

// Throws Error (UNSUPPORTED) with what was required, what each candidate lacks, and the device.
const Implementation &choose(const Params &p);

// The choice as text, one line an implementation; never throws for an unsupported problem.
std::string explain(const Params &p);

}  // namespace flashspark
