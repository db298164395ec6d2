// The memory-bound parts of a decoder block: normalization, rotary positions, gating.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// output [tokens, hidden] = weight · x / sqrt(mean(x²) + epsilon), row by row (Zhang and Sennrich
// 2019, arXiv:1910.07467).
template <typename Scalar>
void rms_norm(ConstMatrixView<Scalar> input, ConstVectorView<Scalar> weight, double epsilon,
              MatrixView<Scalar> output);

// From the gradient [tokens, hidden] of the output: that of the input, written, and that of the
// weight [hidden], added unless it is null.
template <typename Scalar>
void rms_norm_backward(ConstMatrixView<Scalar> input, ConstVectorView<Scalar> weight,
                       double epsilon, ConstMatrixView<Scalar> gradient,
                       MatrixView<Scalar> input_gradient, Scalar* weight_gradient);

// output [tokens, hidden] = weight · (x − mean(x)) / sqrt(variance(x) + epsilon) + bias, row by row
// (Ba et al. 2016, arXiv:1607.06450).
template <typename Scalar>
void layer_norm(ConstMatrixView<Scalar> input, ConstVectorView<Scalar> weight,
                ConstVectorView<Scalar> bias, double epsilon, MatrixView<Scalar> output);

// As rms_norm_backward; the gradient of the bias is the sum of the rows.
template <typename Scalar>
void layer_norm_backward(ConstMatrixView<Scalar> input, ConstVectorView<Scalar> weight,
                         double epsilon, ConstMatrixView<Scalar> gradient,
                         MatrixView<Scalar> input_gradient, Scalar* weight_gradient);

// Rotates `states` [batch · length, heads · width] in place (RoPE, arXiv:2104.09864): of each head,
// the channels [first, first + 2 · pairs) are turned pair by pair by the angle of the position. A
// pair is channel i of the first half and of the second or, `interleaved`, two neighbours. cosines
// and sines are [length, pairs]. With `backward` the turn is transposed: gradients of the result
// become gradients of the states.
template <typename Scalar>
void rotate(MatrixView<Scalar> states, ConstMatrixView<Scalar> cosines,
            ConstMatrixView<Scalar> sines, Index heads, Index first, bool interleaved,
            bool backward);

enum class Activation { silu, gelu_tanh, gelu, relu, relu_squared, sigmoid };

// states [tokens, channels] = activation(states), in place.
template <typename Scalar>
void activate(MatrixView<Scalar> states, Activation activation);

// gradient [tokens, channels] of activation(states) becomes that of the states, in place.
template <typename Scalar>
void activate_backward(ConstMatrixView<Scalar> states, Activation activation,
                       MatrixView<Scalar> gradient);

// gate [tokens, channels] = activation(gate) · up, in place (gated linear units, arXiv:2002.05202).
template <typename Scalar>
void activate_multiply(MatrixView<Scalar> gate, ConstMatrixView<Scalar> up, Activation activation);

// From the gradient [tokens, channels] of activation(gate) · up: that of the gate, in its own
// place, and that of up.
template <typename Scalar>
void activate_multiply_backward(ConstMatrixView<Scalar> gate, ConstMatrixView<Scalar> up,
                                Activation activation, MatrixView<Scalar> gradient,
                                MatrixView<Scalar> up_gradient);

// gate [tokens, channels] = g / (1 + exp(−alpha g)) · (u + 1), in place, with g = min(gate, limit)
// and u = up between −limit and limit (gpt-oss).
template <typename Scalar>
void clamped_swiglu(MatrixView<Scalar> gate, ConstMatrixView<Scalar> up, double alpha,
                    double limit);

// As activate_multiply_backward.
template <typename Scalar>
void clamped_swiglu_backward(ConstMatrixView<Scalar> gate, ConstMatrixView<Scalar> up, double alpha,
                             double limit, MatrixView<Scalar> gradient,
                             MatrixView<Scalar> up_gradient);

}  // namespace bitwright
