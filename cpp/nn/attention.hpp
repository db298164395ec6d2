// Causal self-attention with grouped queries.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// What sets one kind of attention apart from another. `window` is how many tokens a query sees, its
// own included (0: all before it); `softcap` bounds the scaled scores, cap · tanh(score / cap) (0:
// it does not).
struct AttentionRule {
    Index length, heads, key_heads, window;
    float scale, softcap;
};

// output [batch · length, heads · value_width] = softmax(scale · Q Kᵀ + causal mask) V for each
// sample and head; query is [batch · length, heads · width], key [batch · length, key_heads ·
// width], value [batch · length, key_heads · value_width], and query head h reads key head
// h / (heads / key_heads). Scores exist for one tile of queries at a time: memory is linear in the
// length.
void attention(ConstMatrixView<float> query, ConstMatrixView<float> key,
               ConstMatrixView<float> value, const AttentionRule& rule, MatrixView<float> output);

}  // namespace bitwright
