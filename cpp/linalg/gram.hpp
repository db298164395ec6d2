// Second moments of a layer's inputs.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// gram [in, in] += XᵀX for activations X [tokens, in]; only the lower triangle is read and written.
void accumulate_gram(ConstMatrixView<float> activations, MatrixView<float> gram);

// Copies the lower triangle of a square matrix over its upper one.
void mirror_lower(MatrixView<float> matrix);

}  // namespace bitwright
