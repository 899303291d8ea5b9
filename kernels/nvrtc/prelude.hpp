// Included before everything else by NVRTC (src/cuda/nvrtc.cpp): it lacks the builtins of GCC and clang that the
// kernels call, which compile for the host too.
#pragma once

#define __builtin_memcpy memcpy
#define __builtin_fmaxf fmaxf
#define __builtin_fminf fminf
#define __builtin_huge_valf() __int_as_float(0x7f800000)
