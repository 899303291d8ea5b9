// Whose tiles a translation unit takes: those of the architecture it is compiled for, or with -DFLASHSPARK_TILES_SM120F
// (kernels.json) those of sm_120f everywhere.
#pragma once

#include "forward/config.hpp"

namespace flashspark {

#if defined(FLASHSPARK_TILES_SM120F) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200)
constexpr Architecture kArchitecture = Architecture::sm_120f;
#else
constexpr Architecture kArchitecture = Architecture::sm_90;
#endif

}  // namespace flashspark
