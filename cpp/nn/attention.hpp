// Causal self-attention with grouped queries.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// output [batch · length, heads · width] = softmax(scale · Q Kᵀ + causal mask) V for each sample
// and head; query is [batch · length, heads · width], key and value [batch · length, key_heads ·
// width], and query head h reads key head h / (heads / key_heads). Scores exist for one tile of
// queries at a time: memory is linear in the length.
void attention(ConstMatrixView<float> query, ConstMatrixView<float> key,
               ConstMatrixView<float> value, Index length, Index heads, Index key_heads,
               float scale, MatrixView<float> output);

}  // namespace bitwright
