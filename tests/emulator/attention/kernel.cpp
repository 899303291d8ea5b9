// One kernel for the emulator, as kernels/forward/forward.cu is one for a GPU. CMake writes a file for each that sets
// KERNEL_NAME (d128), KERNEL_ELEMENT (Bfloat16, Float16, or E4m3 of k and v alone), KERNEL_ARCHITECTURE (sm_120f) and
// includes this one.
#include "forward/kernel.cuh"

#include "attention/harness.hpp"

namespace flashspark::emulator {
namespace {

using ElementKV = ptx::KERNEL_ELEMENT;
using Mma = std::conditional_t<std::is_same_v<ElementKV, ptx::E4m3>, MmaE4m3Dequant, MmaF16<ElementKV>>;
using Chosen = Traits<InstanceIndex::KERNEL_NAME, Architecture::KERNEL_ARCHITECTURE, Mma>;

const Registration kRegistration{{&kInstances[static_cast<int32_t>(InstanceIndex::KERNEL_NAME)],
                                  std::is_same_v<ElementKV, ptx::E4m3>       ? FLASHSPARK_FLOAT8_E4M3
                                  : std::is_same_v<ElementKV, ptx::Bfloat16> ? FLASHSPARK_BFLOAT16
                                                                             : FLASHSPARK_FLOAT16,
                                  Architecture::KERNEL_ARCHITECTURE, forward<Chosen>}};

}  // namespace
}  // namespace flashspark::emulator
