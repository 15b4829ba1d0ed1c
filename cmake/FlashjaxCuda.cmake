# Decides whether the CUDA module is built. Sets
#   FLASHJAX_CUDA_FOUND                true when it is
#   FLASHJAX_CUDA_VERSION              version of the compiler, or empty
#   FLASHJAX_CUDA_ARCHITECTURES_TEXT   what it is built for, or empty
#   FLASHJAX_CUDA_MISSING              why it is not built, or empty
#   FLASHJAX_HAS_SM90A                 whether the kernels for Hopper are in it
# The last is compiled into flashjax._cpu: pip hides what CMake prints, so the package itself
# tells its user (flashjax.cuda_unavailable_reason(), `flashjax info`).

set(FLASHJAX_CUDA_FOUND FALSE)
set(FLASHJAX_CUDA_VERSION "")
set(FLASHJAX_CUDA_ARCHITECTURES_TEXT "")
set(FLASHJAX_CUDA_MISSING "")
set(FLASHJAX_HAS_SM90A FALSE)

if(NOT FLASHJAX_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FLASHJAX_CUDA must be AUTO, ON or OFF, got '${FLASHJAX_CUDA}'")
endif()

if(FLASHJAX_CUDA STREQUAL "OFF")
  set(FLASHJAX_CUDA_MISSING "it was built with FLASHJAX_CUDA=OFF")
else()
  # A result that an earlier configuration cached would hide an nvcc installed since.
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
    unset(CMAKE_CUDA_COMPILER)
  endif()
  unset(FLASHJAX_NVCC CACHE)
  # check_language() knows CUDACXX and the PATH; toolkits are often on neither.
  if(DEFINED ENV{CUDACXX})
    set(FLASHJAX_NVCC "$ENV{CUDACXX}")
  elseif("$ENV{FLASHJAX_NVCC}" STREQUAL "pypi")
    # What build.requires of pyproject.toml has put into this environment.
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "
import importlib.util, pathlib
spec = importlib.util.find_spec('nvidia')
folders = spec.submodule_search_locations if spec else []
found = [p for f in folders for p in pathlib.Path(f).glob('cu*/bin/nvcc')]
print(found[0] if found else '', end='')"
      OUTPUT_VARIABLE FLASHJAX_NVCC)
  else()
    find_program(FLASHJAX_NVCC nvcc
      HINTS ENV CUDA_HOME ENV CUDA_PATH
      PATHS /usr/local/cuda /opt/cuda
      PATH_SUFFIXES bin)
  endif()

  if(NOT FLASHJAX_NVCC)
    set(FLASHJAX_CUDA_MISSING
      "nvcc was not found when it was built (looked at CUDACXX, PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda)")
  else()
    if(NOT CMAKE_CUDA_COMPILER)
      set(CMAKE_CUDA_COMPILER "${FLASHJAX_NVCC}" CACHE FILEPATH "CUDA compiler")
    endif()
    # sm_80 and sm_90a machine code, and PTX for whatever comes later.
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      if(DEFINED ENV{CUDAARCHS})
        set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
      else()
        set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real;80-virtual")
      endif()
    endif()
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    # nvcc looks for libraries in lib64, which the packages of PyPI call lib; and CMake looks for
    # a shared runtime, which they have under another name and which is not used here.
    file(REAL_PATH "${CMAKE_CUDA_COMPILER}" _toolkit)
    cmake_path(GET _toolkit PARENT_PATH _toolkit)
    cmake_path(GET _toolkit PARENT_PATH _toolkit)
    if(EXISTS "${_toolkit}/lib/libcudart_static.a" AND NOT EXISTS "${_toolkit}/lib64")
      string(APPEND CMAKE_CUDA_FLAGS " -L${_toolkit}/lib")
      set(CUDA_CUDART "${_toolkit}/lib/libcudart_static.a" CACHE FILEPATH "CUDA runtime")
    endif()

    # enable_language() ends the whole build when nvcc does not work, so it is tried apart;
    # once for a compiler, because the trial takes seconds.
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version
                    OUTPUT_VARIABLE _nvcc_version ERROR_QUIET)
    string(SHA1 _probe_key "${CMAKE_CUDA_COMPILER} ${CMAKE_CXX_COMPILER} ${_nvcc_version}")
    set(_probe "${CMAKE_CURRENT_BINARY_DIR}/cuda_probe")
    if(FLASHJAX_CUDA_PROBED STREQUAL _probe_key AND EXISTS "${_probe}/version.txt")
      set(_probe_result 0)
    else()
      file(REMOVE_RECURSE "${_probe}")
      file(WRITE "${_probe}/CMakeLists.txt"
        "cmake_minimum_required(VERSION 3.24)\n"
        "project(probe LANGUAGES CXX CUDA)\n"
        "file(WRITE version.txt \"\${CMAKE_CUDA_COMPILER_VERSION}\")\n")
      execute_process(
        COMMAND "${CMAKE_COMMAND}" -S "${_probe}" -B "${_probe}/build" -G "${CMAKE_GENERATOR}"
          "-DCMAKE_MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM}"
          "-DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}"
          "-DCMAKE_CUDA_COMPILER=${CMAKE_CUDA_COMPILER}"
          "-DCMAKE_CUDA_ARCHITECTURES=80"
          "-DCMAKE_CUDA_FLAGS=${CMAKE_CUDA_FLAGS}"
        RESULT_VARIABLE _probe_result
        OUTPUT_VARIABLE _probe_log ERROR_VARIABLE _probe_log)
      set(FLASHJAX_CUDA_PROBED "${_probe_key}" CACHE INTERNAL "")
    endif()
    if(NOT _probe_result EQUAL 0)
      set(FLASHJAX_CUDA_MISSING "${CMAKE_CUDA_COMPILER} did not compile a test program when it was built")
      message(STATUS "FlashJAX: the test of nvcc failed:\n${_probe_log}")
      unset(CMAKE_CUDA_COMPILER CACHE)
    else()
      file(READ "${_probe}/version.txt" FLASHJAX_CUDA_VERSION)
      if(FLASHJAX_CUDA_VERSION VERSION_LESS 12.0)
        set(FLASHJAX_CUDA_MISSING
          "it was built with CUDA ${FLASHJAX_CUDA_VERSION}, and 12.0 or newer is needed")
        set(FLASHJAX_CUDA_VERSION "")
        unset(CMAKE_CUDA_COMPILER CACHE)
      else()
        set(FLASHJAX_CUDA_FOUND TRUE)
      endif()
    endif()
  endif()
endif()

if(FLASHJAX_CUDA_FOUND)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  # The kernels for Hopper need sm_90a, which every Hopper runs.
  if(CMAKE_CUDA_ARCHITECTURES STREQUAL "native" AND CMAKE_CUDA_ARCHITECTURES_NATIVE)
    set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
  endif()
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90-real$" "90a-real")
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90$" "90a-real;90-virtual")
  if("${CMAKE_CUDA_ARCHITECTURES}" MATCHES "(^|;)90a(-real)?(;|$)")
    set(FLASHJAX_HAS_SM90A TRUE)
  endif()
  string(REPLACE ";" " " FLASHJAX_CUDA_ARCHITECTURES_TEXT "${CMAKE_CUDA_ARCHITECTURES}")
  message(STATUS "FlashJAX: CPU and CUDA (nvcc ${FLASHJAX_CUDA_VERSION}, ${FLASHJAX_CUDA_ARCHITECTURES_TEXT})")
else()
  if(FLASHJAX_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FLASHJAX_CUDA=ON, but ${FLASHJAX_CUDA_MISSING}")
  endif()
  message(NOTICE "FlashJAX: building for the CPU alone: ${FLASHJAX_CUDA_MISSING}")
endif()
