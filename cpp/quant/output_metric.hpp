// The metric of a layer's outputs: second moments of the gradients with respect to them.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// The diagonal blocks of sum += gradientᵀ diag(weight) gradient. gradient is [tokens, out] and
// weight [tokens]; `sum` [out, width] has the blocks of `width` rows below each other, the last one
// with as many columns as it has rows.
void add_output_metric(ConstMatrixView<float> gradient, ConstVectorView<float> weight,
                       MatrixView<float> sum);

}  // namespace bitwright
