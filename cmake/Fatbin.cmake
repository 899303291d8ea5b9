# The CUDA kernels: one fatbin for each line of kernels/forward/instances.def and each number type, all of them embedded
# in the library by one assembly file. Only nvcc is needed, no CUDA language of CMake: nothing here links CUDA.
#
# flashspark_add_kernels(<target>) adds the fatbins and their table (src/cuda/fatbins.hpp) to an object library; without
# nvcc the table is empty, and the library serves the CPU alone. Sets FLASHSPARK_KERNELS to the fatbins' names.
set(FLASHSPARK_CUDA "AUTO" CACHE STRING "Build the CUDA kernels: ON, OFF, or AUTO: where nvcc 12.9 or newer is found")
set_property(CACHE FLASHSPARK_CUDA PROPERTY STRINGS AUTO ON OFF)
set(FLASHSPARK_CUDA_ARCHITECTURES "80;90;120f" CACHE STRING "Architectures of the CUDA kernels")
set(FLASHSPARK_TILES "" CACHE STRING "sm_120f: every architecture takes SM12x's tiles, to time them on another GPU")

# Sets FLASHSPARK_NVCC to the compiler that is to be used; empty: none.
function(flashspark_find_nvcc)
  set(FLASHSPARK_NVCC "" PARENT_SCOPE)
  if(FLASHSPARK_CUDA STREQUAL "OFF")
    message(STATUS "CUDA kernels: not built, FLASHSPARK_CUDA is OFF")
    return()
  endif()
  find_program(FLASHSPARK_NVCC_PROGRAM nvcc
    HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin NO_CMAKE_FIND_ROOT_PATH)
  set(why "no nvcc on PATH or in /usr/local/cuda/bin")
  if(FLASHSPARK_NVCC_PROGRAM)
    execute_process(COMMAND ${FLASHSPARK_NVCC_PROGRAM} --version OUTPUT_VARIABLE text ERROR_QUIET)
    string(REGEX MATCH "V([0-9]+\\.[0-9]+)\\.[0-9]+" version "${text}")
    # sm_120f, one cubin for every SM12x, came with 12.9.
    if(CMAKE_MATCH_1 VERSION_GREATER_EQUAL 12.9)
      message(STATUS "CUDA kernels: ${FLASHSPARK_CUDA_ARCHITECTURES} by ${FLASHSPARK_NVCC_PROGRAM} ${CMAKE_MATCH_1}")
      set(FLASHSPARK_NVCC ${FLASHSPARK_NVCC_PROGRAM} PARENT_SCOPE)
      return()
    endif()
    set(why "${FLASHSPARK_NVCC_PROGRAM} is ${CMAKE_MATCH_1}, older than 12.9")
  endif()
  if(FLASHSPARK_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FLASHSPARK_CUDA is ON, but ${why}")
  endif()
  message(STATUS "CUDA kernels: not built, ${why}")
endfunction()

# Adds the commands that compile `source` to ${FLASHSPARK_FATBIN_FOLDER}/<name>.fatbin.
function(flashspark_add_fatbin name source)
  set(object ${FLASHSPARK_FATBIN_FOLDER}/${name}.o)
  set(fatbin ${FLASHSPARK_FATBIN_FOLDER}/${name}.fatbin)
  set(flags -DFLASHSPARK_ENTRY=flashspark_${name} -std=c++20 -O3 --compress-mode=size -I ${PROJECT_SOURCE_DIR}/kernels ${ARGN})
  if(FLASHSPARK_TILES STREQUAL "sm_120f")
    list(APPEND flags -DFLASHSPARK_TILES_SM120F)
  endif()
  foreach(arch IN LISTS FLASHSPARK_CUDA_ARCHITECTURES)
    list(APPEND flags -gencode arch=compute_${arch},code=sm_${arch})
  endforeach()
  # ccache has no cache for `nvcc -fatbin`, but for `nvcc -c`, whose objects hold the very same bytes in a section.
  if(FLASHSPARK_CCACHE AND FLASHSPARK_OBJCOPY)
    add_custom_command(OUTPUT ${object} ${fatbin}
      COMMAND ${FLASHSPARK_CCACHE} ${FLASHSPARK_NVCC} -c ${flags} ${source} -o ${object} -MD -MF ${object}.d
      COMMAND ${FLASHSPARK_OBJCOPY} -O binary --only-section=.nv_fatbin ${object} ${fatbin}
      DEPENDS ${source} DEPFILE ${object}.d COMMENT "CUDA kernel ${name}" VERBATIM)
  else()
    add_custom_command(OUTPUT ${fatbin}
      COMMAND ${FLASHSPARK_NVCC} -fatbin ${flags} ${source} -o ${fatbin} -MD -MF ${fatbin}.d
      DEPENDS ${source} DEPFILE ${fatbin}.d COMMENT "CUDA kernel ${name}" VERBATIM)
  endif()
endfunction()

function(flashspark_add_kernels target)
  if(FLASHSPARK_TILES AND NOT FLASHSPARK_TILES STREQUAL "sm_120f")
    message(FATAL_ERROR "FLASHSPARK_TILES is ${FLASHSPARK_TILES}, must be empty or sm_120f")
  endif()
  flashspark_find_nvcc()
  set(FLASHSPARK_FATBIN_FOLDER ${PROJECT_BINARY_DIR}/fatbins)
  file(MAKE_DIRECTORY ${FLASHSPARK_FATBIN_FOLDER})
  find_program(FLASHSPARK_CCACHE ccache NO_CMAKE_FIND_ROOT_PATH)
  find_program(FLASHSPARK_OBJCOPY objcopy NO_CMAKE_FIND_ROOT_PATH)  # of this machine: nvcc's objects are for it

  set(names)
  if(FLASHSPARK_NVCC)
    set(definitions ${PROJECT_SOURCE_DIR}/kernels/forward/instances.def)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${definitions})
    file(STRINGS ${definitions} lines REGEX "^FLASHSPARK_INSTANCE\\(")
    set(numbers Bfloat16 Float16)
    set(suffixes bf16 fp16)
    foreach(number suffix IN ZIP_LISTS numbers suffixes)
      foreach(line IN LISTS lines)
        string(REGEX MATCH "^FLASHSPARK_INSTANCE\\(([a-z0-9_]+)" instance "${line}")
        flashspark_add_fatbin(attention_forward_${CMAKE_MATCH_1}_${suffix} ${PROJECT_SOURCE_DIR}/kernels/forward/forward.cu
          -DFLASHSPARK_NAME=${CMAKE_MATCH_1} -DFLASHSPARK_ELEMENT=${number})
        list(APPEND names attention_forward_${CMAKE_MATCH_1}_${suffix})
      endforeach()
      flashspark_add_fatbin(attention_forward_combine_${suffix} ${PROJECT_SOURCE_DIR}/kernels/forward/combine.cu
        -DFLASHSPARK_ELEMENT=${number})
      list(APPEND names attention_forward_combine_${suffix})
    endforeach()
    # Keys and values in e4m3, computed with in fp16.
    foreach(line IN LISTS lines)
      string(REGEX MATCH "^FLASHSPARK_INSTANCE\\(([a-z0-9_]+)," instance "${line}")
      flashspark_add_fatbin(attention_forward_${CMAKE_MATCH_1}_e4m3 ${PROJECT_SOURCE_DIR}/kernels/forward/forward.cu
        -DFLASHSPARK_NAME=${CMAKE_MATCH_1} -DFLASHSPARK_ELEMENT=Float16 -DFLASHSPARK_ELEMENT_KV=E4m3)
      list(APPEND names attention_forward_${CMAKE_MATCH_1}_e4m3)
    endforeach()
    flashspark_add_fatbin(attention_forward_quantize ${PROJECT_SOURCE_DIR}/kernels/forward/quantize.cu)
    list(APPEND names attention_forward_quantize)
    flashspark_add_fatbin(attention_schedule ${PROJECT_SOURCE_DIR}/kernels/forward/scheduler/metadata.cu)
    list(APPEND names attention_schedule)
    flashspark_add_fatbin(append_kv ${PROJECT_SOURCE_DIR}/kernels/append/append.cu)
    list(APPEND names append_kv)
    flashspark_add_fatbin(mma_peak ${PROJECT_SOURCE_DIR}/kernels/peak.cu)
    list(APPEND names mma_peak)
  endif()

  set(FLASHSPARK_KERNELS ${names} PARENT_SCOPE)
  set(assembly "// Generated by cmake/Fatbin.cmake.\n  .section .rodata\n")
  set(declarations "")
  set(rows "")
  set(files)
  foreach(name IN LISTS names)
    set(symbol flashspark_fatbin_${name})
    set(file ${FLASHSPARK_FATBIN_FOLDER}/${name}.fatbin)
    string(APPEND assembly "  .balign 64\n  .globl ${symbol}\n  .hidden ${symbol}\n${symbol}:\n  .incbin \"${file}\"\n"
      "  .globl ${symbol}_end\n  .hidden ${symbol}_end\n${symbol}_end:\n")
    string(APPEND declarations "extern \"C\" const unsigned char ${symbol}[], ${symbol}_end[];\n")
    string(APPEND rows "    {\"${name}\", ${symbol}, ${symbol}_end},\n")
    list(APPEND files ${file})
  endforeach()
  string(APPEND assembly "  .section .note.GNU-stack,\"\",%progbits\n")
  string(REPLACE ";" ", " architectures "${FLASHSPARK_CUDA_ARCHITECTURES}")
  string(REGEX REPLACE "([0-9]+f?)" "sm_\\1" architectures "${architectures}")
  if(NOT names)
    set(architectures "")
  endif()
  string(CONCAT table "// Generated by cmake/Fatbin.cmake.\n#include \"cuda/fatbins.hpp\"\n\n${declarations}\n"
    "namespace flashspark::cuda {\n\nstd::span<const Fatbin> fatbins() {\n"
    "  static constexpr Fatbin table[] = {\n${rows}    {\"\", nullptr, nullptr},\n  };\n"
    "  return {table, std::size(table) - 1};\n}\n\n"
    "const char *fatbin_architectures() {\n  return \"${architectures}\";\n}\n\n}  // namespace flashspark::cuda\n")
  file(CONFIGURE OUTPUT ${FLASHSPARK_FATBIN_FOLDER}/fatbins.S CONTENT "${assembly}" @ONLY)
  file(CONFIGURE OUTPUT ${FLASHSPARK_FATBIN_FOLDER}/fatbins.cpp CONTENT "${table}" @ONLY)
  target_sources(${target} PRIVATE ${FLASHSPARK_FATBIN_FOLDER}/fatbins.cpp)
  if(names)
    set_source_files_properties(${FLASHSPARK_FATBIN_FOLDER}/fatbins.S PROPERTIES OBJECT_DEPENDS "${files}")
    target_sources(${target} PRIVATE ${FLASHSPARK_FATBIN_FOLDER}/fatbins.S)
  endif()
  if(FLASHSPARK_TILES STREQUAL "sm_120f")
    target_compile_definitions(${target} PRIVATE FLASHSPARK_TILES_SM120F)
  endif()
endfunction()
