# Release wheels for Linux: zig's clang and libc++ against glibc 2.28's symbols, for x86-64 and 64-bit Arm alike.
# tools/dev/release.py names the machine.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR $ENV{FLASHSPARK_RELEASE_MACHINE})
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
