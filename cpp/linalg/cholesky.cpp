#include "linalg/cholesky.hpp"

#include "linalg/product.hpp"

extern "C" {  // LAPACK, column-major; CMake maps the names where the library prefixes them
void spotrf_(const char* triangle, const int* size, float* matrix, const int* stride, int* info);
void strtri_(const char* triangle, const char* diagonal, const int* size, float* matrix,
             const int* stride, int* info);
}

namespace bitwright {
namespace {

constexpr Index block_size = 256;  // rows and columns that LAPACK takes at once, on one thread
constexpr Index panel_rows = 128;  // right-hand sides of a triangular system on one thread

enum class Side { left, right };

// sides ← L⁻¹ · sides, sides · L⁻¹, or sides · L⁻ᵀ, with L a lower triangle.
template <Side side, bool transposed = false, typename Lower, typename Sides>
void solve_triangle(const Lower& lower, Sides&& sides) {
    const auto triangle = lower.template triangularView<Eigen::Lower>();
    const Index count = side == Side::left ? sides.cols() : sides.rows();
    parallel_for(count, panel_rows, [&](Index first, Index last) {
        if constexpr (side == Side::left) {
            auto part = sides.middleCols(first, last - first);
            triangle.solveInPlace(part);
        } else {
            auto part = sides.middleRows(first, last - first);
            if constexpr (transposed)
                triangle.transpose().template solveInPlace<Eigen::OnTheRight>(part);
            else
                triangle.template solveInPlace<Eigen::OnTheRight>(part);
        }
    });
}

// The lower triangle of rows and columns [first, first + size).
void invert_lower(MatrixView<float> matrix, Index first, Index size) {
    if (size <= block_size) {
        const int n = static_cast<int>(size), stride = static_cast<int>(matrix.cols());
        int info = 0;
        // LAPACK's upper triangle is the lower one of a row-major matrix.
        strtri_("U", "N", &n, &matrix(first, first), &stride, &info);
        return;
    }
    // The inverse of [[A, 0], [B, C]] is [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]].
    const Index above = ((size + block_size - 1) / block_size + 1) / 2 * block_size,
                below = size - above;
    auto corner = matrix.block(first + above, first, below, above);
    corner = -corner;
    solve_triangle<Side::left>(matrix.block(first + above, first + above, below, below), corner);
    solve_triangle<Side::right>(matrix.block(first, first, above, above), corner);
    invert_lower(matrix, first, above);
    invert_lower(matrix, first + above, below);
}

}  // namespace

bool cholesky_factor(MatrixView<float> matrix) {
    const Index size = matrix.rows();
    const int stride = static_cast<int>(size);
    for (Index first = 0; first < size; first += block_size) {
        const Index width = std::min(block_size, size - first), rest = size - first - width;
        const int n = static_cast<int>(width);
        int info = 0;
        // LAPACK's upper triangle is the lower one of a row-major matrix.
        spotrf_("U", &n, &matrix(first, first), &stride, &info);
        if (info != 0) return false;
        if (rest == 0) break;
        auto panel = matrix.block(first + width, first, rest, width);
        solve_triangle<Side::right, true>(matrix.block(first, first, width, width), panel);
        add_lower_product(matrix.bottomRightCorner(rest, rest), panel, -1.0f);
    }
    return true;
}

void invert_lower(MatrixView<float> matrix) { invert_lower(matrix, 0, matrix.rows()); }

void cholesky_solve(ConstMatrixView<float> factor, MatrixView<float> rows) {
    solve_triangle<Side::right, true>(factor, rows);
    solve_triangle<Side::right>(factor, rows);
}

}  // namespace bitwright
