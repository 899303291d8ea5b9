# kernels.json in the build folder: every kernel that there is. kernels/kernels.def and kernels/forward/instances.def
# say so, and cmake/kernels_json.cpp, a program for this machine, prints what they say.
#
# flashspark_list_kernels(<variable>) makes it and reads it. Call it only where kernels are compiled: whoever builds the
# library for the CPU needs no second compiler.
function(flashspark_list_kernels variable)
  set(program ${PROJECT_SOURCE_DIR}/cmake/kernels_json.cpp)
  set(folder ${PROJECT_SOURCE_DIR}/kernels)
  file(GLOB data ${folder}/*.def ${folder}/*.hpp ${folder}/*/*.def ${folder}/*/*.hpp)
  set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    ${program} ${PROJECT_SOURCE_DIR}/src/cuda/kernel_key.hpp ${data})
  set(compiler ${CMAKE_CXX_COMPILER})
  if(CMAKE_CROSSCOMPILING)
    find_program(FLASHSPARK_HOST_CXX NAMES c++ g++ clang++ REQUIRED NO_CMAKE_FIND_ROOT_PATH)
    set(compiler ${FLASHSPARK_HOST_CXX})
  endif()
  execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND ${compiler} -std=c++20 ${program}
    -I ${PROJECT_SOURCE_DIR}/kernels -I ${PROJECT_SOURCE_DIR}/src -o ${PROJECT_BINARY_DIR}/kernels_json)
  execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND ${PROJECT_BINARY_DIR}/kernels_json OUTPUT_VARIABLE kernels)
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/kernels.json CONTENT "${kernels}" @ONLY)
  set(${variable} "${kernels}" PARENT_SCOPE)
endfunction()

# The strings of the array that has this key.
function(flashspark_json_list variable object key)
  string(JSON array GET "${object}" ${key})
  string(JSON count LENGTH "${array}")
  set(items)
  if(count GREATER 0)
    math(EXPR last "${count} - 1")
    foreach(n RANGE ${last})
      string(JSON item GET "${array}" ${n})
      list(APPEND items "${item}")
    endforeach()
  endif()
  set(${variable} ${items} PARENT_SCOPE)
endfunction()
