// A module of its own, for any processor: which builds of the kernels this one can run.
#include <pybind11/pybind11.h>

namespace {

// The highest x86-64 microarchitecture level (System V psABI) of this processor, or 0 elsewhere.
int x86_64_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const auto all = [](auto... present) { return (... && (present != 0)); };
    if (!all(__builtin_cpu_supports("sse3"), __builtin_cpu_supports("ssse3"),
             __builtin_cpu_supports("sse4.1"), __builtin_cpu_supports("sse4.2"),
             __builtin_cpu_supports("popcnt")))
        return 1;
    if (!all(__builtin_cpu_supports("avx"), __builtin_cpu_supports("avx2"),
             __builtin_cpu_supports("bmi"), __builtin_cpu_supports("bmi2"),
             __builtin_cpu_supports("fma"), __builtin_cpu_supports("f16c")))
        return 2;
    if (!all(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
             __builtin_cpu_supports("avx512cd"), __builtin_cpu_supports("avx512dq"),
             __builtin_cpu_supports("avx512vl")))
        return 3;
    return 4;
#else
    return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_processor, module) { module.def("x86_64_level", &x86_64_level); }
