// The memory-bound parts of a decoder block: normalization, rotary positions, gating.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// output [tokens, hidden] = weight · x / sqrt(mean(x²) + epsilon), row by row (Zhang and Sennrich
// 2019).
void rms_norm(ConstMatrixView<float> input, ConstVectorView<float> weight, float epsilon,
              MatrixView<float> output);

// output [tokens, hidden] = weight · (x − mean(x)) / sqrt(variance(x) + epsilon) + bias, row by row
// (Ba et al. 2016).
void layer_norm(ConstMatrixView<float> input, ConstVectorView<float> weight,
                ConstVectorView<float> bias, float epsilon, MatrixView<float> output);

// Rotates `states` [batch · length, heads · width] in place (Su et al. 2021): of each head, the
// channels [first, first + 2 · pairs) are turned pair by pair by the angle of the position. A pair
// is channel i of the first half and of the second or, `interleaved`, two neighbours. cosines and
// sines are [length, pairs].
void rotate(MatrixView<float> states, ConstMatrixView<float> cosines, ConstMatrixView<float> sines,
            Index heads, Index first, bool interleaved);

enum class Activation { silu, gelu_tanh, gelu, relu };

// states [tokens, channels] = activation(states), in place.
void activate(MatrixView<float> states, Activation activation);

// gate [tokens, channels] = activation(gate) · up, in place (gated linear units, Shazeer 2020).
void activate_multiply(MatrixView<float> gate, ConstMatrixView<float> up, Activation activation);

}  // namespace bitwright
