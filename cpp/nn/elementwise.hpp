// The memory-bound parts of a decoder block: normalization, rotary positions, gating.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// output [tokens, hidden] = weight · x / sqrt(mean(x²) + epsilon), row by row (Zhang and Sennrich
// 2019).
void rms_norm(ConstMatrixView<float> input, ConstVectorView<float> weight, float epsilon,
              MatrixView<float> output);

// Rotates `states` [batch · length, heads · width] in place (Su et al. 2021): of each head, channel
// i of the first half and of the second form a pair, turned by the angle of its position. cosines
// and sines are [length, width / 2].
void rotate(MatrixView<float> states, ConstMatrixView<float> cosines, ConstMatrixView<float> sines,
            Index heads);

// gate [tokens, channels] = gate / (1 + exp(−gate)) · up, in place (SwiGLU, Shazeer 2020).
void silu_multiply(MatrixView<float> gate, ConstMatrixView<float> up);

}  // namespace bitwright
