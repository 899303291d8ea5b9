// create_block_mask on a GPU, with a driver that computes nothing: compiled and loaded once, launched as planned, also
// while a stream is captured.
#include <gtest/gtest.h>

#include "cuda/block_mask.hpp"
#include "cuda/fake_cuda.hpp"
#include "cuda/processes.hpp"
#include "support/block_masks.hpp"
#include "support/named_graphs.hpp"

namespace flashspark::cuda {
namespace {

TEST(BlockMaskLaunch, CompilesOnceAndFollowsThePlan) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  fake_cuda::State &fake = fake_cuda::state();
  const graph::Graph graph = *test::named("neighbours").mask();
  const test::Function function(graph, false, {}), equal(graph, false, {});
  fake_cuda::set_current_device(0);
  fake.launches.clear(), fake.loads.clear(), fake.order.clear();
  fake.capturing = true;
  void *const stream = &fake;
  for (const auto &[mask, block_size, loads] :
       {std::tuple{&function, 128, 1u}, {&function, 128, 1u}, {&equal, 256, 1u}, {&function, 64, 2u}}) {
    test::MaskLists lists;
    flashspark_block_mask_params p = test::mask_params({2, 3, 1000, 1000, 128, block_size}, mask->get(), lists);
    p.device = FLASHSPARK_CUDA, p.stream = stream;
    create_block_mask(p);
    EXPECT_EQ(fake.loads.size(), loads) << "with blocks of " << block_size << " keys";
    const fake_cuda::Launch &launch = fake.launches.back();
    EXPECT_EQ(launch.function, "flashspark_block_mask");
    EXPECT_TRUE(launch.grid[0] == 8 && launch.grid[1] == 1 && launch.grid[2] == 1) << "the same for all heads";
    EXPECT_EQ(launch.threads, static_cast<unsigned>(kBlockMaskThreads));
    EXPECT_EQ(launch.shared_bytes, make_block_mask_plan(p).launch.shared_bytes);
    EXPECT_TRUE(launch.stream == stream && launch.device == 0 && launch.early);
  }
  EXPECT_EQ(fake.launches.size(), 4u);
  EXPECT_EQ(fake.order.size(), 4u) << "no memory is taken";
  fake.capturing = false;
}

}  // namespace
}  // namespace flashspark::cuda
