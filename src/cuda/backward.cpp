#include "cuda/backward.hpp"

#include <algorithm>
#include <bit>
#include <iterator>

#include "cuda/arguments.hpp"
#include "cuda/device.hpp"
#include "cuda/launch.hpp"
#include "cuda/metadata.hpp"
#include "cuda/module.hpp"
#include "cuda/workspace.hpp"

namespace flashspark::cuda {

std::string unsupported_backward(const BackwardParams &params) {
  const Params &p = params.forward;
  std::string text = unsupported(p);
  const auto add = [&](const std::string &what) {
    if (!what.empty()) text += (text.empty() ? "" : "; ") + what;
  };
  add(misaligned_rows(p, "out", p.out));
  add(misaligned_rows(p, "dout", params.dout));
  add(unsupported_backward_functions(params));
  const int64_t padded = (is_varlen_q(p) ? p.total_q : p.num_seqs * p.max_seqlen_q) + 64 * (p.num_seqs + 1);
  if (padded > kMaxTokens) add("tokens of all sequences, each up to whole blocks of 64, > 2^30");
  return text;
}

void backward(const BackwardParams &params, const ScratchSource &scratch) {
  const Params &p = params.forward;
  check_if_asked(p);
  const DeviceFacts &device = device_facts(p.device_index);
  BackwardPlan plan = make_backward_plan(params, device.machine);
  const CurrentDevice current(p.device_index);
  const auto stream = static_cast<Stream>(p.stream);
  // Kernels before memory: loading one may fail.
  const Kernel preprocess = get(plan.preprocess_key(), p.device_index);
  const Kernel main = plan.functions ? get_backward_function_kernel(p, *plan.functions, plan.main_key(), p.device_index)
                                     : get(plan.main_key(), p.device_index, plan.main.shared_bytes);
  const auto small_kernel = [&](Operation operation, bool is_needed) {
    return is_needed ? get({operation}, p.device_index) : nullptr;
  };
  const Kernel clear =
      small_kernel(Operation::attention_backward_clear, plan.functions && plan.functions->clear.grid[0] > 0);
  const Kernel make_blocks =
      small_kernel(Operation::attention_backward_blocks, plan.functions && plan.functions->make_blocks.grid[0] > 0);
  const Kernel round =
      small_kernel(Operation::attention_backward_round, plan.functions && plan.functions->sums_exactly());
  const Kernel postprocess = get(plan.postprocess_key(), p.device_index);
  const Kernel sums = plan.sums.grid[0] > 0 ? get(plan.sums_key(), p.device_index) : Kernel{};
  const Workspace memory({params.workspace, params.workspace_size}, stream, scratch, plan.workspace());
  plan.bind(memory.data());
  const auto put = [&](Kernel each, const Launch &shape, const void *arguments) {
    if (shape.grid[0] > 0) launch(each, shape, arguments, stream, device.machine.arch);
  };
  if (plan.functions) {
    put(clear, plan.functions->clear, &plan.functions->clear_arguments);
    put(make_blocks, plan.functions->make_blocks, &plan.functions->block_arguments);
  }
  put(preprocess, plan.preprocess, &plan.arguments);
  if (plan.functions) {
    const FunctionBackwardArguments arguments = plan.functions->with(plan.arguments);
    put(main, plan.main, &arguments);
  } else {
    put(main, plan.main, &plan.arguments);
  }
  put(postprocess, plan.postprocess, &plan.arguments);
  put(sums, plan.sums, &plan.arguments);
  if (plan.functions) put(round, plan.functions->round, &plan.functions->round_arguments);
  for (int64_t pass = 1; plan.functions && pass < plan.functions->passes; ++pass) {
    BackwardFunctionPlan &functions = *plan.functions;
    functions.begin_pass(pass);
    const FunctionBackwardArguments arguments = functions.for_sums_alone(plan.arguments);
    put(clear, functions.clear, &functions.clear_arguments);
    put(main, plan.main, &arguments);
    put(round, functions.round, &functions.round_arguments);
  }
}

size_t backward_workspace(const BackwardParams &p) {
  return make_backward_plan(p, device_facts(p.forward.device_index).machine).workspace();
}

std::string backward_plan_text(const BackwardParams &p) {
  const int32_t index = p.forward.device_index;
  if (!device_unavailable_reason(index).empty() || !unsupported_backward(p).empty()) return {};
  return to_string(make_backward_plan(p, device_facts(index).machine));
}

}  // namespace flashspark::cuda
