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

// result = activation(values).
void activate_row(const AlignedRow& values, AlignedRow& result, Activation activation) {
    switch (activation) {
        case Activation::silu:
            result = values / (1.0f + (-values).exp());
            break;
        case Activation::gelu_tanh:  // Hendrycks and Gimpel 2016, its approximation
            result = 0.7978845608f * (values + 0.044715f * values.cube());
            result = 0.5f * values * (1.0f + result.tanh());
            break;
        case Activation::gelu:
            result = values.unaryExpr(
                [](float x) { return 0.5f * x * (1.0f + std::erf(x * 0.7071067812f)); });
            break;
        case Activation::relu:
            result = values.max(0.0f);
            break;
    }
}

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

void layer_norm(ConstMatrixView<float> input, ConstVectorView<float> weight,
                ConstVectorView<float> bias, float epsilon, MatrixView<float> output) {
    const AlignedRow gain = weight.transpose().array(), offset = bias.transpose().array();
    parallel_for(input.rows(), 32, [&](Index first, Index last) {
        AlignedRow values(input.cols()), result(input.cols());
        for (Index row = first; row < last; ++row) {
            values = input.row(row).array();
            result = values - values.mean();
            const float factor = 1.0f / std::sqrt(result.square().mean() + epsilon);
            values = gain * (result * factor) + offset;
            output.row(row).array() = values;
        }
    });
}

void rotate(MatrixView<float> states, ConstMatrixView<float> cosines, ConstMatrixView<float> sines,
            Index heads, Index first, bool interleaved) {
    const Index length = cosines.rows(), pairs = cosines.cols(), width = states.cols() / heads;
    const Index step = interleaved ? 2 : 1, gap = interleaved ? 1 : pairs;
    using Channels = Eigen::Map<AlignedRow, 0, Eigen::InnerStride<>>;
    parallel_for(states.rows(), 32, [&](Index begin, Index end) {
        AlignedRow left(pairs), right(pairs), turned(pairs), cosine(pairs), sine(pairs);
        for (Index row = begin; row < end; ++row) {
            cosine = cosines.row(row % length).array();
            sine = sines.row(row % length).array();
            for (Index head = 0; head < heads; ++head) {
                float* channels = &states(row, head * width + first);
                Channels lefts(channels, pairs, Eigen::InnerStride<>(step));
                Channels rights(channels + gap, pairs, Eigen::InnerStride<>(step));
                left = lefts;
                right = rights;
                turned = left * cosine - right * sine;
                lefts = turned;
                turned = right * cosine + left * sine;
                rights = turned;
            }
        }
    });
}

void activate(MatrixView<float> states, Activation activation) {
    parallel_for(states.rows(), 4, [&](Index first, Index last) {
        AlignedRow values(states.cols()), result(states.cols());
        for (Index row = first; row < last; ++row) {
            values = states.row(row).array();
            activate_row(values, result, activation);
            states.row(row).array() = result;
        }
    });
}

void activate_multiply(MatrixView<float> gate, ConstMatrixView<float> up, Activation activation) {
    parallel_for(gate.rows(), 4, [&](Index first, Index last) {
        AlignedRow values(gate.cols()), result(gate.cols());
        for (Index row = first; row < last; ++row) {
            values = gate.row(row).array();
            activate_row(values, result, activation);
            gate.row(row).array() = result * up.row(row).array();
        }
    });
}

}  // namespace bitwright
