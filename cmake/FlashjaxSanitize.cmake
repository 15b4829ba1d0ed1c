# FLASHJAX_SANITIZE: sanitizers for the C++ of the CPU module, such as address,undefined. Such a
# module only loads into a Python that has the sanitizers' libraries preloaded (`make sanitize`).
# Sets FLASHJAX_STRIP, an option of nanobind_add_module(), and FLASHJAX_OPTIMIZE.

set(FLASHJAX_SANITIZE "" CACHE STRING "Sanitizers, for tests: address,undefined or nothing")
set(FLASHJAX_STRIP "")
set(FLASHJAX_OPTIMIZE -O3)

if(FLASHJAX_SANITIZE)
  if(NOT FLASHJAX_CUDA STREQUAL "OFF")
    message(FATAL_ERROR "FLASHJAX_SANITIZE is for the CPU module: it needs FLASHJAX_CUDA=OFF")
  endif()
  set(FLASHJAX_STRIP NOSTRIP)
  set(FLASHJAX_OPTIMIZE -O1)  # -O3 takes minutes to compile with the checks
  add_compile_options(-fsanitize=${FLASHJAX_SANITIZE} -fno-sanitize-recover=all
                      -fno-omit-frame-pointer -g1 ${FLASHJAX_OPTIMIZE})
  add_link_options(-fsanitize=${FLASHJAX_SANITIZE})
endif()
