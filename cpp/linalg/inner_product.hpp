// The inner product of two matrices.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// Σ a b over all elements of two matrices of one shape, in double.
double inner_product(ConstMatrixView<float> a, ConstMatrixView<float> b);

}  // namespace bitwright
