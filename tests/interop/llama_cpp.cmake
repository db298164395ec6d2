# For CMAKE_PROJECT_llama_cpp_INCLUDE: hides the cached variable that llama-cpp-python forces on, so that
# llama.cpp's library for its own tools is not built: 82 files to compile or link instead of 140.
set(LLAMA_BUILD_COMMON OFF)
