// y = x Wᵀ + b.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// output [tokens, out] = input [tokens, in] · weight [out, in]ᵀ + bias [out] (null: none). With
// `accumulate` the result is added to the output: a residual connection without a buffer of its
// own. A weight in 16 bits is widened tile by tile.
template <typename Scalar, typename Weight>
void linear(ConstMatrixView<Scalar> input, ConstMatrixView<Weight> weight, const Scalar* bias,
            bool accumulate, MatrixView<Scalar> output);

// The gradient of the input [tokens, in], given that of the output [tokens, out]: gradient ·
// weight, written or, with `accumulate`, added.
template <typename Scalar, typename Weight>
void linear_backward_input(ConstMatrixView<Scalar> gradient, ConstMatrixView<Weight> weight,
                           bool accumulate, MatrixView<Scalar> input_gradient);

// weight_gradient [out, in] += gradient [tokens, out]ᵀ · input [tokens, in].
template <typename Scalar>
void linear_backward_weight(ConstMatrixView<Scalar> gradient, ConstMatrixView<Scalar> input,
                            MatrixView<Scalar> weight_gradient);

// The same for a quantized weight, w = scale · code + bias: of each group of an output row
// scale_gradients [out, groups] += Σ code · dw and bias_gradients [out, groups] += Σ dw, where dw =
// gradientᵀ · input exists for some rows at a time. `group_of` [in] names each channel's group, and
// `points` [256], where not null, what codes stand for.
template <typename Scalar>
void linear_backward_groups(ConstMatrixView<Scalar> gradient, ConstMatrixView<Scalar> input,
                            ConstMatrixView<std::uint8_t> codes,
                            ConstVectorView<std::int32_t> group_of, const float* points,
                            MatrixView<Scalar> scale_gradients, MatrixView<Scalar> bias_gradients);

}  // namespace bitwright
