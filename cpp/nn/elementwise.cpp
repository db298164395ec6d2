#include "nn/elementwise.hpp"

#include <cmath>

#include "linalg/sum.hpp"
#include "linalg/threads.hpp"

namespace bitwright {
namespace {

constexpr double root_two_over_pi = 0.7978845608028654, cubic = 0.044715;
constexpr double root_half = 0.7071067811865476, root_half_over_pi = 0.3989422804014327;

// result = activation(values).
template <typename Scalar>
void activate_row(const AlignedRow<Scalar>& values, AlignedRow<Scalar>& result,
                  Activation activation) {
    switch (activation) {
        case Activation::silu:
            result = values / (1 + (-values).exp());
            break;
        case Activation::gelu_tanh:  // Hendrycks and Gimpel 2016, its approximation
            result = Scalar(root_two_over_pi) * (values + Scalar(cubic) * values.cube());
            result = Scalar(0.5) * values * (1 + result.tanh());
            break;
        case Activation::gelu:
            result = values.unaryExpr(
                [](Scalar x) { return Scalar(0.5) * x * (1 + std::erf(x * Scalar(root_half))); });
            break;
        case Activation::relu:
            result = values.max(Scalar(0));
            break;
        case Activation::relu_squared:
            result = values.max(Scalar(0)).square();
            break;
        case Activation::sigmoid:
            result = 1 / (1 + (-values).exp());
            break;
    }
}

// result = activation'(values).
template <typename Scalar>
void slope_row(const AlignedRow<Scalar>& values, AlignedRow<Scalar>& result,
               Activation activation) {
    switch (activation) {
        case Activation::silu:
            result = 1 / (1 + (-values).exp());
            result = result * (1 + values * (1 - result));
            break;
        case Activation::gelu_tanh: {
            result = (Scalar(root_two_over_pi) * (values + Scalar(cubic) * values.cube())).tanh();
            result = Scalar(0.5) * (1 + result) + Scalar(0.5 * root_two_over_pi) * values *
                                                      (1 - result.square()) *
                                                      (1 + Scalar(3 * cubic) * values.square());
            break;
        }
        case Activation::gelu:
            result = values.unaryExpr([](Scalar x) {
                return Scalar(0.5) * (1 + std::erf(x * Scalar(root_half))) +
                       Scalar(root_half_over_pi) * x * std::exp(Scalar(-0.5) * x * x);
            });
            break;
        case Activation::relu:
            result = (values > Scalar(0)).template cast<Scalar>();
            break;
        case Activation::relu_squared:
            result = 2 * values.max(Scalar(0));
            break;
        case Activation::sigmoid:
            result = 1 / (1 + (-values).exp());
            result = result * (1 - result);
            break;
    }
}

// Calls body(row, part) for every row, where part [channels] is to be added to. The parts of 256
// rows each are summed up in `total`, in one order however many threads there are; where it is null
// nobody reads them.
template <typename Scalar, typename Body>
void sum_over_rows(Index rows, Index channels, Scalar* total, const Body& body) {
    constexpr Index grain = 256;
    Matrix<Scalar> parts = Matrix<Scalar>::Zero((rows + grain - 1) / grain, channels);
    parallel_for(rows, total ? grain : 32, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) body(row, parts.row(row / grain).array());
    });
    if (total)
        Eigen::Map<Eigen::Matrix<Scalar, 1, Eigen::Dynamic>>(total, channels) += column_sums(parts);
}

// Backwards through weight · (x − mean) · factor, factor = 1 / sqrt(mean((x − mean)²) + epsilon);
// `centred` as in layer norm, or with a mean of 0.
template <typename Scalar>
void norm_backward(bool centred, ConstMatrixView<Scalar> input, ConstVectorView<Scalar> weight,
                   double epsilon, ConstMatrixView<Scalar> gradient,
                   MatrixView<Scalar> input_gradient, Scalar* weight_gradient) {
    const auto channels = static_cast<Scalar>(input.cols());
    const auto body = [&](Index row, auto weight_part) {
        const auto above = gradient.row(row).array();
        const auto gain = weight.transpose().array();
        const Scalar middle = centred ? mean(input.row(row)) : Scalar(0);
        const auto values = input.row(row).array() - middle;
        const Scalar factor =
            1 / std::sqrt(sum(values.square()) / channels + static_cast<Scalar>(epsilon));
        // d factor / d x = −factor³ (x − mean) / channels
        const Scalar shared = factor * factor * factor * sum(above * gain * values) / channels;
        const Scalar average = centred ? factor * sum(above * gain) / channels : Scalar(0);
        const AlignedRow<Scalar> result = factor * above * gain - average - shared * values;
        input_gradient.row(row).array() = result;
        if (weight_gradient) weight_part += factor * above * values;
    };
    sum_over_rows(input.rows(), input.cols(), weight_gradient, body);
}

}  // namespace

template <typename Scalar>
void rms_norm(ConstMatrixView<Scalar> input, ConstVectorView<Scalar> weight, double epsilon,
              MatrixView<Scalar> output) {
    parallel_for(input.rows(), 32, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            const auto values = input.row(row).array();
            const Scalar factor =
                1 / std::sqrt(mean(values.square()) + static_cast<Scalar>(epsilon));
            output.row(row).array() = weight.transpose().array() * (values * factor);
        }
    });
}

template <typename Scalar>
void rms_norm_backward(ConstMatrixView<Scalar> input, ConstVectorView<Scalar> weight,
                       double epsilon, ConstMatrixView<Scalar> gradient,
                       MatrixView<Scalar> input_gradient, Scalar* weight_gradient) {
    norm_backward(false, input, weight, epsilon, gradient, input_gradient, weight_gradient);
}

template <typename Scalar>
void layer_norm(ConstMatrixView<Scalar> input, ConstVectorView<Scalar> weight,
                ConstVectorView<Scalar> bias, double epsilon, MatrixView<Scalar> output) {
    const AlignedRow<Scalar> gain = weight.transpose().array(), offset = bias.transpose().array();
    parallel_for(input.rows(), 32, [&](Index first, Index last) {
        AlignedRow<Scalar> values(input.cols()), result(input.cols());
        for (Index row = first; row < last; ++row) {
            values = input.row(row).array();
            result = values - mean(values);
            const Scalar factor =
                1 / std::sqrt(mean(result.square()) + static_cast<Scalar>(epsilon));
            values = gain * (result * factor) + offset;
            output.row(row).array() = values;
        }
    });
}

template <typename Scalar>
void layer_norm_backward(ConstMatrixView<Scalar> input, ConstVectorView<Scalar> weight,
                         double epsilon, ConstMatrixView<Scalar> gradient,
                         MatrixView<Scalar> input_gradient, Scalar* weight_gradient) {
    norm_backward(true, input, weight, epsilon, gradient, input_gradient, weight_gradient);
}

template <typename Scalar>
void rotate(MatrixView<Scalar> states, ConstMatrixView<Scalar> cosines,
            ConstMatrixView<Scalar> sines, Index heads, Index first, bool interleaved,
            bool backward) {
    const Index length = cosines.rows(), pairs = cosines.cols(), width = states.cols() / heads;
    const Index step = interleaved ? 2 : 1, gap = interleaved ? 1 : pairs;
    const Scalar direction = backward ? -1 : 1;
    using Channels = Eigen::Map<AlignedRow<Scalar>, 0, Eigen::InnerStride<>>;
    parallel_for(states.rows(), 32, [&](Index begin, Index end) {
        AlignedRow<Scalar> left(pairs), right(pairs), turned(pairs), cosine(pairs), sine(pairs);
        for (Index row = begin; row < end; ++row) {
            cosine = cosines.row(row % length).array();
            sine = direction * sines.row(row % length).array();
            for (Index head = 0; head < heads; ++head) {
                Scalar* channels = &states(row, head * width + first);
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

template <typename Scalar>
void activate(MatrixView<Scalar> states, Activation activation) {
    parallel_for(states.rows(), 4, [&](Index first, Index last) {
        AlignedRow<Scalar> values(states.cols()), result(states.cols());
        for (Index row = first; row < last; ++row) {
            values = states.row(row).array();
            activate_row(values, result, activation);
            states.row(row).array() = result;
        }
    });
}

template <typename Scalar>
void activate_backward(ConstMatrixView<Scalar> states, Activation activation,
                       MatrixView<Scalar> gradient) {
    parallel_for(states.rows(), 4, [&](Index first, Index last) {
        AlignedRow<Scalar> values(states.cols()), slope(states.cols());
        for (Index row = first; row < last; ++row) {
            values = states.row(row).array();
            slope_row(values, slope, activation);
            gradient.row(row).array() *= slope;
        }
    });
}

template <typename Scalar>
void activate_multiply(MatrixView<Scalar> gate, ConstMatrixView<Scalar> up, Activation activation) {
    parallel_for(gate.rows(), 4, [&](Index first, Index last) {
        AlignedRow<Scalar> values(gate.cols()), result(gate.cols());
        for (Index row = first; row < last; ++row) {
            values = gate.row(row).array();
            activate_row(values, result, activation);
            gate.row(row).array() = result * up.row(row).array();
        }
    });
}

template <typename Scalar>
void activate_multiply_backward(ConstMatrixView<Scalar> gate, ConstMatrixView<Scalar> up,
                                Activation activation, MatrixView<Scalar> gradient,
                                MatrixView<Scalar> up_gradient) {
    parallel_for(gate.rows(), 4, [&](Index first, Index last) {
        AlignedRow<Scalar> values(gate.cols()), result(gate.cols());
        for (Index row = first; row < last; ++row) {
            values = gate.row(row).array();
            activate_row(values, result, activation);
            up_gradient.row(row).array() = gradient.row(row).array() * result;
            slope_row(values, result, activation);
            gradient.row(row).array() *= result * up.row(row).array();
        }
    });
}

template <typename Scalar>
void clamped_swiglu(MatrixView<Scalar> gate, ConstMatrixView<Scalar> up, double alpha,
                    double limit) {
    const auto steep = static_cast<Scalar>(alpha), most = static_cast<Scalar>(limit);
    parallel_for(gate.rows(), 4, [&](Index first, Index last) {
        AlignedRow<Scalar> values(gate.cols()), factors(gate.cols());
        for (Index row = first; row < last; ++row) {
            values = gate.row(row).array().min(most);
            factors = up.row(row).array().min(most).max(-most) + 1;
            values = values / (1 + (-steep * values).exp()) * factors;
            gate.row(row).array() = values;
        }
    });
}

template <typename Scalar>
void clamped_swiglu_backward(ConstMatrixView<Scalar> gate, ConstMatrixView<Scalar> up, double alpha,
                             double limit, MatrixView<Scalar> gradient,
                             MatrixView<Scalar> up_gradient) {
    const auto steep = static_cast<Scalar>(alpha), most = static_cast<Scalar>(limit);
    const Index columns = gate.cols();
    parallel_for(gate.rows(), 4, [&](Index first, Index last) {
        AlignedRow<Scalar> gates(columns), ups(columns), values(columns), shares(columns),
            above(columns), result(columns);
        for (Index row = first; row < last; ++row) {
            gates = gate.row(row).array();
            ups = up.row(row).array();
            above = gradient.row(row).array();
            values = gates.min(most);
            shares = 1 / (1 + (-steep * values).exp());
            result = above * values * shares * (ups.abs() <= most).template cast<Scalar>();
            up_gradient.row(row).array() = result;
            result = above * (ups.min(most).max(-most) + 1) * shares *
                     (1 + steep * values * (1 - shares)) * (gates <= most).template cast<Scalar>();
            gradient.row(row).array() = result;
        }
    });
}

#define BITWRIGHT_ELEMENTWISE(Scalar)                                                             \
    template void rms_norm(ConstMatrixView<Scalar>, ConstVectorView<Scalar>, double,              \
                           MatrixView<Scalar>);                                                   \
    template void rms_norm_backward(ConstMatrixView<Scalar>, ConstVectorView<Scalar>, double,     \
                                    ConstMatrixView<Scalar>, MatrixView<Scalar>, Scalar*);        \
    template void layer_norm(ConstMatrixView<Scalar>, ConstVectorView<Scalar>,                    \
                             ConstVectorView<Scalar>, double, MatrixView<Scalar>);                \
    template void layer_norm_backward(ConstMatrixView<Scalar>, ConstVectorView<Scalar>, double,   \
                                      ConstMatrixView<Scalar>, MatrixView<Scalar>, Scalar*);      \
    template void rotate(MatrixView<Scalar>, ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,    \
                         Index, Index, bool, bool);                                               \
    template void activate(MatrixView<Scalar>, Activation);                                       \
    template void activate_backward(ConstMatrixView<Scalar>, Activation, MatrixView<Scalar>);     \
    template void activate_multiply(MatrixView<Scalar>, ConstMatrixView<Scalar>, Activation);     \
    template void activate_multiply_backward(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,    \
                                             Activation, MatrixView<Scalar>, MatrixView<Scalar>); \
    template void clamped_swiglu(MatrixView<Scalar>, ConstMatrixView<Scalar>, double, double);    \
    template void clamped_swiglu_backward(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,       \
                                          double, double, MatrixView<Scalar>, MatrixView<Scalar>);
BITWRIGHT_ELEMENTWISE(float)
BITWRIGHT_ELEMENTWISE(double)

}  // namespace bitwright
