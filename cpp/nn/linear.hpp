// y = x Wᵀ + b.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// output [tokens, out] = input [tokens, in] · weight [out, in]ᵀ + bias [out] (null: none). With
// `accumulate` the result is added to the output: a residual connection without a buffer of its
// own.
void linear(ConstMatrixView<float> input, ConstMatrixView<float> weight, const float* bias,
            bool accumulate, MatrixView<float> output);

}  // namespace bitwright
