#include "nn/elementwise.hpp"

#include <cmath>

#include "linalg/threads.hpp"

namespace bitwright {
namespace {

// Eigen computes the elements before the first aligned address one by one, whose exp() and fused
// multiply-add differ in the last bit from those of whole registers. NumPy aligns to 16 bytes only,
// so what could differ is computed in buffers of our own: equal inputs give equal bits wherever
// they lie.
using AlignedRow = Eigen::Array<float, 1, Eigen::Dynamic>;

}  // namespace

void rms_norm(ConstMatrixView<float> input, ConstVectorView<float> weight, float epsilon,
              MatrixView<float> output) {
    parallel_for(input.rows(), 32, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            const auto values = input.row(row).array();
            const float factor =
                1.0f /
                std::sqrt(values.square().sum() / static_cast<float>(values.size()) + epsilon);
            output.row(row).array() = weight.transpose().array() * (values * factor);
        }
    });
}

void rotate(MatrixView<float> states, ConstMatrixView<float> cosines, ConstMatrixView<float> sines,
            Index heads) {
    const Index length = cosines.rows(), half = cosines.cols();
    parallel_for(states.rows(), 32, [&](Index first, Index last) {
        AlignedRow left(half), right(half), turned(half), cosine(half), sine(half);
        for (Index row = first; row < last; ++row) {
            cosine = cosines.row(row % length).array();
            sine = sines.row(row % length).array();
            for (Index head = 0; head < heads; ++head) {
                auto channels = states.row(row).segment(head * 2 * half, 2 * half).array();
                left = channels.head(half);
                right = channels.tail(half);
                turned = left * cosine - right * sine;
                channels.head(half) = turned;
                turned = right * cosine + left * sine;
                channels.tail(half) = turned;
            }
        }
    });
}

void silu_multiply(MatrixView<float> gate, ConstMatrixView<float> up) {
    parallel_for(gate.rows(), 4, [&](Index first, Index last) {
        AlignedRow values(gate.cols()), product(gate.cols());
        for (Index row = first; row < last; ++row) {
            values = gate.row(row).array();
            product = values / (1.0f + (-values).exp());
            gate.row(row).array() = product * up.row(row).array();
        }
    });
}

}  // namespace bitwright
