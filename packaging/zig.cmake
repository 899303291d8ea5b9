# What the toolchains share whose compiler is zig's clang, with its libc++: tools/dev/zig.py writes the compilers and the
# folder of header-only libraries, and whoever configures names their folder in the environment.
set(FLASHSPARK_RELEASE "$ENV{FLASHSPARK_RELEASE}" CACHE PATH "The compilers' folder")  # for when CMake runs again
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES FLASHSPARK_RELEASE)
if(NOT EXISTS ${FLASHSPARK_RELEASE}/c++)
  message(FATAL_ERROR "no compilers in FLASHSPARK_RELEASE = \"${FLASHSPARK_RELEASE}\": tools/dev/zig.py writes them")
endif()
set(CMAKE_C_COMPILER ${FLASHSPARK_RELEASE}/cc)
set(CMAKE_CXX_COMPILER ${FLASHSPARK_RELEASE}/c++)
set(CMAKE_AR ${FLASHSPARK_RELEASE}/ar)
set(CMAKE_RANLIB ${FLASHSPARK_RELEASE}/ranlib)
set(CMAKE_DLLTOOL ${FLASHSPARK_RELEASE}/dlltool)
set(CMAKE_STRIP "")  # zig has none: the linker strips
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
# Equal bytes wherever the tree lies.
set(CMAKE_C_FLAGS_INIT "-g0 -ffile-prefix-map=${CMAKE_SOURCE_DIR}=.")
set(CMAKE_CXX_FLAGS_INIT "${CMAKE_C_FLAGS_INIT}")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-s")
set(CMAKE_MODULE_LINKER_FLAGS_INIT "-s")
set(CMAKE_EXE_LINKER_FLAGS_INIT "-s")
foreach(library HWY CLI11 FMT JSON)
  set(FLASHSPARK_${library}_INCLUDE_DIR ${FLASHSPARK_RELEASE}/include CACHE PATH "")
endforeach()
