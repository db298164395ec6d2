#pragma once

#include <pybind11/pybind11.h>

namespace bitwright {

void bind_linalg(pybind11::module_& module);
void bind_quant(pybind11::module_& module);
void bind_nn(pybind11::module_& module);

}  // namespace bitwright
