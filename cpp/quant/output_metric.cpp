#include "quant/output_metric.hpp"

#include <algorithm>

#include "linalg/threads.hpp"

namespace bitwright {

void add_output_metric(ConstMatrixView<float> gradient, ConstVectorView<float> weight,
                       MatrixView<float> sum) {
    const Index width = sum.cols(), out = gradient.cols();
    parallel_for((out + width - 1) / width, 1, [&](Index begin, Index end) {
        for (Index index = begin; index < end; ++index) {
            const Index first = index * width, rows = std::min(width, out - first);
            const Matrix<float> block = gradient.middleCols(first, rows);
            const Matrix<float> weighed = weight.asDiagonal() * block;
            sum.block(first, 0, rows, rows).noalias() += weighed.transpose() * block;
        }
    });
}

}  // namespace bitwright
