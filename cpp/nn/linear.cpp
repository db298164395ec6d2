#include "nn/linear.hpp"

#include <algorithm>

#include "linalg/product.hpp"
#include "linalg/sum.hpp"

namespace bitwright {
namespace {

constexpr Index tile_bytes = 4 << 20;  // of the dense gradient that exists at a time

}  // namespace

template <typename Scalar, typename Weight>
void linear(ConstMatrixView<Scalar> input, ConstMatrixView<Weight> weight, const Scalar* bias,
            bool accumulate, MatrixView<Scalar> output) {
    if (accumulate)
        add_product(output, input, weight.transpose());
    else
        set_product(output, input, weight.transpose());
    if (bias) output.rowwise() += ConstVectorView<Scalar>(bias, output.cols()).transpose();
}

template <typename Scalar, typename Weight>
void linear_backward_input(ConstMatrixView<Scalar> gradient, ConstMatrixView<Weight> weight,
                           bool accumulate, MatrixView<Scalar> input_gradient) {
    if (accumulate)
        add_product(input_gradient, gradient, weight);
    else
        set_product(input_gradient, gradient, weight);
}

template <typename Scalar>
void linear_backward_weight(ConstMatrixView<Scalar> gradient, ConstMatrixView<Scalar> input,
                            MatrixView<Scalar> weight_gradient) {
    add_product(weight_gradient, gradient.transpose(), input);
}

template <typename Scalar>
void linear_backward_groups(ConstMatrixView<Scalar> gradient, ConstMatrixView<Scalar> input,
                            ConstMatrixView<std::uint8_t> codes,
                            ConstVectorView<std::int32_t> group_of, const float* points,
                            MatrixView<Scalar> scale_gradients, MatrixView<Scalar> bias_gradients) {
    const Index out = codes.rows(), channels = codes.cols();
    const Index tile = std::clamp<Index>(tile_bytes / (channels * Index{sizeof(Scalar)}), 64,
                                         std::max<Index>(out, 64));
    Matrix<Scalar> dense(std::min(tile, out), channels);
    for (Index first = 0; first < out; first += tile) {
        const Index rows = std::min(tile, out - first);
        set_product(dense.topRows(rows), gradient.middleCols(first, rows).transpose(), input);
        parallel_for(rows, 8, [&](Index begin, Index end) {
            Eigen::Array<Scalar, 1, Eigen::Dynamic> code(channels);
            for (Index row = begin; row < end; ++row) {
                const std::uint8_t* bytes = codes.data() + (first + row) * channels;
                Scalar* values = code.data();  // Eigen's cast from bytes is not vectorized
                for (Index j = 0; j < channels; ++j) values[j] = static_cast<Scalar>(bytes[j]);
                if (points)
                    for (Index j = 0; j < channels; ++j)
                        values[j] = static_cast<Scalar>(points[bytes[j]]);
                // Runs of one group, which is nearly always one run per group.
                for (Index start = 0, stop; start < channels; start = stop) {
                    const std::int32_t group = group_of[start];
                    stop = start + 1;
                    while (stop < channels && group_of[stop] == group) ++stop;
                    const auto change = dense.row(row).segment(start, stop - start).array();
                    scale_gradients(first + row, group) +=
                        sum(change * code.segment(start, stop - start));
                    bias_gradients(first + row, group) += sum(change);
                }
            }
        });
    }
}

#define BITWRIGHT_LINEAR_OF(Scalar, Weight)                                                     \
    template void linear(ConstMatrixView<Scalar>, ConstMatrixView<Weight>, const Scalar*, bool, \
                         MatrixView<Scalar>);                                                   \
    template void linear_backward_input(ConstMatrixView<Scalar>, ConstMatrixView<Weight>, bool, \
                                        MatrixView<Scalar>);
BITWRIGHT_LINEAR_OF(float, float)
BITWRIGHT_LINEAR_OF(float, Eigen::half)
BITWRIGHT_LINEAR_OF(float, Eigen::bfloat16)
BITWRIGHT_LINEAR_OF(double, double)

#define BITWRIGHT_LINEAR(Scalar)                                                           \
    template void linear_backward_weight(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>, \
                                         MatrixView<Scalar>);                              \
    template void linear_backward_groups(                                                  \
        ConstMatrixView<Scalar>, ConstMatrixView<Scalar>, ConstMatrixView<std::uint8_t>,   \
        ConstVectorView<std::int32_t>, const float*, MatrixView<Scalar>, MatrixView<Scalar>);
BITWRIGHT_LINEAR(float)
BITWRIGHT_LINEAR(double)

}  // namespace bitwright
