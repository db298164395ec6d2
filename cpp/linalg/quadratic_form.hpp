// The output error of a layer whose weights have changed, from the second moments of its inputs.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// forms[r] = δ G δᵀ for every row δ of `change` [rows, n], with the symmetric `gram` [n, n].
void row_quadratic_forms(ConstMatrixView<float> change, ConstMatrixView<float> gram,
                         VectorView<double> forms);

}  // namespace bitwright
