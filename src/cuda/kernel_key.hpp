// The identity of a kernel: what it is found by, and named after.
#pragma once

#include <iterator>
#include <string>
#include <vector>

#include "backward/config.hpp"
#include "forward/config.hpp"
#include "kernels.hpp"

namespace flashspark::cuda {

using flashspark::KernelDType;
using flashspark::Operation;

struct KernelKey {
  Operation operation{};
  KernelDType dtype = KernelDType::none;
  InstanceIndex instance = InstanceIndex::none;  // it has a score modification of its own, or none
  BackwardIndex backward = BackwardIndex::none;  // of operations whose instances are those of the backward pass

  bool operator==(const KernelKey &) const = default;

  const Instance *instance_traits() const {
    return instance == InstanceIndex::none ? nullptr : &kInstances[static_cast<int32_t>(instance)];
  }
  const BackwardInstance *backward_traits() const {
    return backward == BackwardIndex::none ? nullptr : &instance_of(backward);
  }
  const char *instance_name() const {
    if (backward != BackwardIndex::none) return backward_traits()->name;
    return instance == InstanceIndex::none ? "" : instance_traits()->name;
  }
  // A number for each instance of an operation, 0 for none.
  int32_t instance_number() const {
    return 1 + (backward == BackwardIndex::none ? static_cast<int32_t>(instance) : static_cast<int32_t>(backward));
  }
  ScoreMod score_mod() const { return instance == InstanceIndex::none ? ScoreMod::none : instance_traits()->score_mod; }
  // "attention_forward_d128_prefill_bf16": its fatbin's name; "flashspark_" + name() is its entry point.
  std::string name() const;
};

constexpr const char *name_of(KernelDType dtype) {
  constexpr const char *kNames[] = {"", "bf16", "fp16", "e4m3"};
  return kNames[static_cast<int32_t>(dtype)];
}

inline std::string KernelKey::name() const {
  std::string text = traits_of(operation).name;
  for (const char *part : {instance_name(), name_of(dtype)}) {
    if (*part != '\0') text.append("_").append(part);
  }
  return text;
}

// Every kernel there is: operations and instances in the order of their data, each in all its types.
inline std::vector<KernelKey> all_kernels() {
  std::vector<KernelKey> keys;
  for (const OperationTraits &traits : operations::kTable) {
    const auto operation = static_cast<Operation>(&traits - operations::kTable);
    const auto add = [&](InstanceIndex instance, BackwardIndex backward) {
      keys.push_back({operation, traits.dtypes[0], instance, backward});
      for (size_t n = 1; n < std::size(traits.dtypes) && traits.dtypes[n] != KernelDType::none; ++n)
        keys.push_back({operation, traits.dtypes[n], instance, backward});
    };
    if (traits.instances == InstanceTable::none) add(InstanceIndex::none, BackwardIndex::none);
    if (traits.instances == InstanceTable::forward) {
      for (const Instance &instance : kInstances) add(instance.index, BackwardIndex::none);
    }
    if (traits.instances == InstanceTable::backward) {
      for (const BackwardInstance &instance : kBackwardInstances) add(InstanceIndex::none, instance.index);
    }
  }
  return keys;
}

}  // namespace flashspark::cuda
