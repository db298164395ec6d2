#include "linalg/cholesky.hpp"

extern "C" {  // LAPACK, column-major; CMake maps the names where the library prefixes them
void spotrf_(const char* triangle, const int* size, float* matrix, const int* stride, int* info);
void spotrs_(const char* triangle, const int* size, const int* columns, const float* factor,
             const int* factor_stride, float* columns_data, const int* columns_stride, int* info);
}

namespace bitwright {

// LAPACK's upper triangle is the lower one of a row-major matrix, and its columns are our rows.
bool cholesky_factor(MatrixView<float> matrix) {
    const int n = static_cast<int>(matrix.rows());
    int info = 0;
    spotrf_("U", &n, matrix.data(), &n, &info);
    return info == 0;
}

void cholesky_solve(ConstMatrixView<float> factor, MatrixView<float> rows) {
    const int n = static_cast<int>(factor.rows()), count = static_cast<int>(rows.rows());
    int info = 0;
    spotrs_("U", &n, &count, factor.data(), &n, rows.data(), &n, &info);
}

}  // namespace bitwright
