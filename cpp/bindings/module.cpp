// The extension module. CMake builds it once per instruction set, under another name each time;
// python/bitwright/_kernels.py imports the best one that the processor runs.
#include <pybind11/pybind11.h>

#include "bindings/bind.hpp"
#include "linalg/threads.hpp"

PYBIND11_MODULE(BITWRIGHT_MODULE, module) {
    module.attr("instruction_set") = BITWRIGHT_INSTRUCTION_SET;
    bitwright::num_threads();  // before the first call of BLAS
    bitwright::bind_linalg(module);
    bitwright::bind_quant(module);
    bitwright::bind_nn(module);
}
