// Cholesky factors of damped grams, their inverses, and solutions from them, with the same bits on
// any number of threads.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// Overwrites the lower triangle of a symmetric matrix [n, n] by its Cholesky factor; false where it
// is not positive definite in float32.
bool cholesky_factor(MatrixView<float> matrix);

// Overwrites the lower triangle of a matrix [n, n] by its inverse.
void invert_lower(MatrixView<float> matrix);

// Overwrites `rows` [rows, n] by rows · A⁻¹, with the factor of A [n, n] from cholesky_factor.
void cholesky_solve(ConstMatrixView<float> factor, MatrixView<float> rows);

}  // namespace bitwright
