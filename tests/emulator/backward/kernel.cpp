// One backward kernel for the emulator, the counterpart of kernels/backward/backward.cu. CMake generates one source per
// kernel that defines the same macros (kernels.json) and EMULATED_TILES (sm_120f) and includes this file.
#include "backward/kernel.cuh"

#include "backward/problem.hpp"

namespace flashspark::emulator {
namespace {

using Element = ptx::FLASHSPARK_ELEMENT;
using Chosen = BackwardTraits<BackwardIndex::FLASHSPARK_NAME, Architecture::EMULATED_TILES, Element>;

const BackwardRegistration kRegistration{
    {&kBackwardInstances[static_cast<int32_t>(BackwardIndex::FLASHSPARK_NAME)],
     std::is_same_v<Element, ptx::Bfloat16> ? FLASHSPARK_BFLOAT16 : FLASHSPARK_FLOAT16, Architecture::EMULATED_TILES,
     backward<Chosen>}};

}  // namespace
}  // namespace flashspark::emulator
