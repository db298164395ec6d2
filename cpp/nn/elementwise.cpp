#include "nn/elementwise.hpp"

#include <cmath>

#include "linalg/threads.hpp"

namespace bitwright {

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
        Eigen::ArrayXf turned(half);
        for (Index row = first; row < last; ++row) {
            const Eigen::Map<const Eigen::ArrayXf> cosine(cosines.data() + row % length * half,
                                                          half);
            const Eigen::Map<const Eigen::ArrayXf> sine(sines.data() + row % length * half, half);
            for (Index head = 0; head < heads; ++head) {
                float* start = states.data() + row * states.cols() + head * 2 * half;
                Eigen::Map<Eigen::ArrayXf> left(start, half), right(start + half, half);
                turned = left * cosine - right * sine;
                right = right * cosine + left * sine;
                left = turned;
            }
        }
    });
}

void silu_multiply(MatrixView<float> gate, ConstMatrixView<float> up) {
    parallel_for(gate.rows(), 4, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            auto values = gate.row(row).array();
            values = values / (1.0f + (-values).exp()) * up.row(row).array();
        }
    });
}

}  // namespace bitwright
