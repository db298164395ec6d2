#include "nn/linear.hpp"

#include <algorithm>

#include "linalg/threads.hpp"

namespace bitwright {
namespace {

constexpr Index TILE = 128;  // output rows whose dense gradient a thread has at a time

}  // namespace

template <typename Scalar>
void linear(ConstMatrixView<Scalar> input, ConstMatrixView<Scalar> weight, const Scalar* bias,
            bool accumulate, MatrixView<Scalar> output) {
    if (accumulate)
        output.noalias() += input * weight.transpose();
    else
        output.noalias() = input * weight.transpose();
    if (bias) output.rowwise() += ConstVectorView<Scalar>(bias, output.cols()).transpose();
}

template <typename Scalar>
void linear_backward_input(ConstMatrixView<Scalar> gradient, ConstMatrixView<Scalar> weight,
                           bool accumulate, MatrixView<Scalar> input_gradient) {
    if (accumulate)
        input_gradient.noalias() += gradient * weight;
    else
        input_gradient.noalias() = gradient * weight;
}

template <typename Scalar>
void linear_backward_weight(ConstMatrixView<Scalar> gradient, ConstMatrixView<Scalar> input,
                            MatrixView<Scalar> weight_gradient) {
    weight_gradient.noalias() += gradient.transpose() * input;
}

template <typename Scalar>
void linear_backward_groups(ConstMatrixView<Scalar> gradient, ConstMatrixView<Scalar> input,
                            ConstMatrixView<std::uint8_t> codes,
                            ConstVectorView<std::int32_t> group_of,
                            MatrixView<Scalar> scale_gradients, MatrixView<Scalar> bias_gradients) {
    const Index out = codes.rows(), channels = codes.cols();
    const SerialBlas serial;
    parallel_for((out + TILE - 1) / TILE, 1, [&](Index begin, Index end) {
        Matrix<Scalar> tile(std::min(TILE, out), channels);
        for (Index item = begin; item < end; ++item) {
            const Index first = item * TILE, rows = std::min(TILE, out - first);
            auto dense = tile.topRows(rows);
            dense.noalias() = gradient.middleCols(first, rows).transpose() * input;
            for (Index row = 0; row < rows; ++row) {
                // Runs of one group, which is nearly always one run per group.
                for (Index start = 0, stop; start < channels; start = stop) {
                    const std::int32_t group = group_of[start];
                    stop = start + 1;
                    while (stop < channels && group_of[stop] == group) ++stop;
                    const auto change = dense.row(row).segment(start, stop - start).array();
                    const auto code = codes.row(first + row).segment(start, stop - start).array();
                    scale_gradients(first + row, group) +=
                        (change * code.template cast<Scalar>()).sum();
                    bias_gradients(first + row, group) += change.sum();
                }
            }
        }
    });
}

#define BITWRIGHT_LINEAR(Scalar)                                                                \
    template void linear(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>, const Scalar*, bool, \
                         MatrixView<Scalar>);                                                   \
    template void linear_backward_input(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>, bool, \
                                        MatrixView<Scalar>);                                    \
    template void linear_backward_weight(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,      \
                                         MatrixView<Scalar>);                                   \
    template void linear_backward_groups(                                                       \
        ConstMatrixView<Scalar>, ConstMatrixView<Scalar>, ConstMatrixView<std::uint8_t>,        \
        ConstVectorView<std::int32_t>, MatrixView<Scalar>, MatrixView<Scalar>);
BITWRIGHT_LINEAR(float)
BITWRIGHT_LINEAR(double)

}  // namespace bitwright
