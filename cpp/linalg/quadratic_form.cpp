#include "linalg/quadratic_form.hpp"

#include <algorithm>

#include "linalg/product.hpp"
#include "linalg/sum.hpp"

namespace bitwright {

// With Δ and G cut into panels of columns, and G symmetric,
//     δ G δᵀ = Σⱼ (2 Σ_{i>j} δᵢ Gᵢⱼ + δⱼ Gⱼⱼ) δⱼᵀ,
// half the products of (ΔG)∘Δ. A triangular factor of G would cost the same, but G need not have
// one in float32: with fewer tokens than channels it is singular.
void row_quadratic_forms(ConstMatrixView<float> change, ConstMatrixView<float> gram,
                         VectorView<double> forms) {
    constexpr Index panel = 256;
    const Index rows = change.rows(), size = change.cols();
    Matrix<float> product(rows, std::min(panel, size));
    forms.setZero();
    for (Index first = 0; first < size; first += panel) {
        const Index width = std::min(panel, size - first), last = first + width;
        auto part = product.leftCols(width);
        set_product(part, change.middleCols(first, width), gram.block(first, first, width, width));
        if (last < size)
            add_product(part, change.rightCols(size - last),
                        gram.block(last, first, size - last, width), 2.0f);
        parallel_for(rows, 16, [&](Index begin, Index end) {
            for (Index row = begin; row < end; ++row)
                forms[row] += dot(part.row(row), change.row(row).segment(first, width));
        });
    }
}

}  // namespace bitwright
