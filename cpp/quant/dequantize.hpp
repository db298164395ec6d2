// Codes to weights.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// weight [out, in] = scale·(code − zero) + bias, in float32, each operation rounded on its own so
// that every processor gives the same bits. scales, zeros and biases are [out, groups]; a null
// zeros or biases counts as 0. `points` [256], where not null, are what codes stand for: then it is
// scale·points[code]. groups [in] names each column's group; null: `in / groups`
// consecutive columns each.
void dequantize(ConstMatrixView<std::uint8_t> codes, ConstMatrixView<float> scales,
                const float* zeros, const float* biases, const std::int32_t* groups,
                const float* points, MatrixView<float> weight);

}  // namespace bitwright
