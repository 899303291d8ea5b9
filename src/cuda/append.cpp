#include "cuda/append.hpp"

#include "cuda/device.hpp"
#include "cuda/launch.hpp"
#include "cuda/metadata.hpp"
#include "cuda/module.hpp"
namespace flashspark::cuda {

void append_kv(const AppendParams &p) {
  check_if_asked(p);
  const AppendPlan plan = make_append_plan(p);
  if (plan.launch.grid[0] == 0) return;  // no new rows
  const CurrentDevice current(p.device_index);
  launch(get({Operation::append_kv}, p.device_index), plan.launch, &plan.arguments, static_cast<Stream>(p.stream),
         device_facts(p.device_index).machine.arch);
}

}  // namespace flashspark::cuda
