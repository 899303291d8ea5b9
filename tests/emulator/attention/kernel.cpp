// One kernel for the emulator, as kernels/forward/forward.cu is one for a GPU. CMake writes a file for each that sets
// KERNEL_NAME (d128), KERNEL_NUMBER (Bfloat16), KERNEL_ARCHITECTURE (sm_120f) and includes this one.
#include "forward/forward.cuh"

#include "attention/harness.hpp"

namespace flashspark::emulator {
namespace {

using Chosen = Traits<InstanceIndex::KERNEL_NAME, Architecture::KERNEL_ARCHITECTURE, ptx::KERNEL_NUMBER>;

const Registration kRegistration{
    {&kInstances[static_cast<int32_t>(InstanceIndex::KERNEL_NAME)],
     std::is_same_v<Chosen::Number, ptx::Bfloat16> ? FLASHSPARK_BFLOAT16 : FLASHSPARK_FLOAT16,
     Architecture::KERNEL_ARCHITECTURE, forward<Chosen>}};

}  // namespace
}  // namespace flashspark::emulator
