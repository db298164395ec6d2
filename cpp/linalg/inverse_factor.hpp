// The triangular factor that GPTQ's error propagation reads.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// Writes U [in, in], upper triangular with zeros below, such that (G + D)⁻¹ = UᵀU, where column j
// of G is column order[j] of gram [in, in] and D = damping · I, plus one where the diagonal of gram
// is zero. Returns false when G + D is not positive definite in float32; upper is then undefined.
bool inverse_factor(ConstMatrixView<float> gram, ConstVectorView<std::int32_t> order, float damping,
                    MatrixView<float> upper);

}  // namespace bitwright
