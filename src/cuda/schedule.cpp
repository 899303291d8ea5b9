#include "cuda/schedule.hpp"

#include "cuda/device.hpp"
#include "cuda/launch.hpp"
#include "cuda/module.hpp"
#include "cuda/plan.hpp"
#include "error.hpp"

namespace flashspark::cuda {

int64_t schedule_size(const Params &p) {
  return make_plan(p, device_facts(p.device_index).machine).schedule_size();
}

void schedule(const Params &p) {
  const Machine &machine = device_facts(p.device_index).machine;
  const Plan plan = make_plan(p, machine);
  const int64_t size = plan.schedule_size();
  if (size == 0) return;
  if (p.scheduler_metadata == nullptr)
    fail("scheduler_metadata", "NULL", "must point to " + std::to_string(size) + " elements");
  if (p.scheduler_metadata_size < size)
    fail("scheduler_metadata_size", p.scheduler_metadata_size, "must be at least " + std::to_string(size));
  // The tensors of the calls are not known here, only that positions have 32 bits: the calls clamp what they read.
  ScheduleArguments arguments = plan.schedule_arguments();
  arguments.scheduler_metadata = p.scheduler_metadata;
  arguments.key_rows = max_key_rows(shape_of(p), plan.arguments);
  arguments.last_batch = INT32_MAX;
  const CurrentDevice current(p.device_index);
  launch(get({Operation::attention_schedule}, p.device_index), plan.schedule(), &arguments,
         static_cast<Stream>(p.stream), machine.arch);
}

}  // namespace flashspark::cuda
