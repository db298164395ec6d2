#include "nn/linear.hpp"

namespace bitwright {

void linear(ConstMatrixView<float> input, ConstMatrixView<float> weight, const float* bias,
            bool accumulate, MatrixView<float> output) {
    if (accumulate)
        output.noalias() += input * weight.transpose();
    else
        output.noalias() = input * weight.transpose();
    if (bias) output.rowwise() += ConstVectorView<float>(bias, output.cols()).transpose();
}

}  // namespace bitwright
