// The names of kernels, and that the list of them says what their names do.
#include "cuda/kernel_key.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>

namespace flashspark::cuda {
namespace {

TEST(KernelKey, Names) {
  EXPECT_EQ((KernelKey{Operation::attention_forward, KernelDType::bf16, InstanceIndex::d128_prefill}.name()),
            "attention_forward_d128_prefill_bf16");
  EXPECT_EQ((KernelKey{Operation::attention_forward, KernelDType::e4m3, InstanceIndex::d64_prefill_mod}.name()),
            "attention_forward_d64_prefill_mod_e4m3");
  EXPECT_EQ((KernelKey{Operation::attention_forward_combine, KernelDType::fp16}.name()),
            "attention_forward_combine_fp16");
  EXPECT_EQ(KernelKey{Operation::attention_forward_quantize}.name(), "attention_forward_quantize");
  EXPECT_EQ(KernelKey{Operation::attention_schedule}.name(), "attention_schedule");
  EXPECT_EQ(KernelKey{Operation::append_kv}.name(), "append_kv");
  EXPECT_EQ(KernelKey{Operation::mma_peak}.name(), "mma_peak");
  EXPECT_EQ(
      (KernelKey{Operation::attention_backward, KernelDType::bf16, InstanceIndex::none, BackwardIndex::d96_mod}.name()),
      "attention_backward_d96_mod_bf16");
}

TEST(KernelKey, EveryKernelHasANameOfItsOwn) {
  const std::vector<KernelKey> keys = all_kernels();
  std::set<std::string> names;
  for (const KernelKey &key : keys) {
    EXPECT_TRUE(names.insert(key.name()).second) << key.name();
    EXPECT_EQ(std::count(keys.begin(), keys.end(), key), 1) << key.name();
    const InstanceTable table = traits_of(key.operation).instances;
    EXPECT_EQ(key.instance != InstanceIndex::none, table == InstanceTable::forward) << key.name();
    EXPECT_EQ(key.backward != BackwardIndex::none, table == InstanceTable::backward) << key.name();
  }
  EXPECT_GE(keys.size(), 3 * std::size(kInstances) + 2 * std::size(kBackwardInstances) + 10);
}

TEST(KernelKey, InstancesAreNamedAfterTheirColumns) {
  constexpr const char *kTilings[] = {"_prefill", "_short_q", "_decode"};
  for (const Instance &instance : kInstances) {
    EXPECT_EQ(&kInstances[static_cast<int32_t>(instance.index)], &instance);
    EXPECT_EQ(instance.name, "d" + std::to_string(instance.head_dim) + kTilings[static_cast<int32_t>(instance.tiling)] +
                                 (instance.score_mod == ScoreMod::none ? "" : "_mod"));
    const KernelKey key{Operation::attention_forward, KernelDType::bf16, instance.index};
    EXPECT_EQ(key.score_mod(), instance.score_mod);
  }
}

TEST(KernelKey, BackwardInstancesAreNamedAfterTheirColumns) {
  const std::map<ScoreMod, std::string> kSuffixes = {
      {ScoreMod::none, ""}, {ScoreMod::native, "_mod"}, {ScoreMod::dropout, "_dropout"}};
  for (const BackwardInstance &instance : kBackwardInstances) {
    EXPECT_EQ(&kBackwardInstances[static_cast<int32_t>(instance.index)], &instance);
    const std::map<SumOrder, std::string> kOrders = {
        {SumOrder::as_asked, ""}, {SumOrder::unordered, ""}, {SumOrder::turns, "_turns"}, {SumOrder::walks, "_walks"}};
    EXPECT_EQ(instance.name, "d" + std::to_string(instance.head_dim) + kSuffixes.at(instance.score_mod) +
                                 kOrders.at(instance.sm_120f.order));
  }
}

TEST(KernelKey, KernelsWithoutInstancesSayHowTheyAreLaunched) {
  for (const OperationTraits &traits : operations::kTable) {
    if (traits.instances != InstanceTable::none) continue;
    EXPECT_TRUE(traits.threads >= 32 && traits.threads <= 1024 && traits.threads % 32 == 0) << traits.name;
    EXPECT_GE(traits.min_ctas, 1u) << traits.name;
  }
}

}  // namespace
}  // namespace flashspark::cuda
