// Causal self-attention with grouped queries. All kernels of a decoder block compute in float or,
// to be checked by finite differences, in double.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// The variants of attention. `window` is how many tokens a query sees, its
// own included (0: all before it); `past` is how many keys come before that of the first query;
// `softcap` bounds the scaled scores, cap · tanh(score / cap) (0:
// it does not).
struct AttentionRule {
    Index length, heads, key_heads, window;
    double scale, softcap;
    Index past = 0;

    Index seen() const { return past + length; }
};

// output [batch · length, heads · value_width] = softmax(scale · Q Kᵀ + causal mask) V for each
// sample and head; query is [batch · length, heads · width], key [batch · (past + length),
// key_heads · width], value [batch · (past + length), key_heads · value_width], and query head h
// reads key head h / (heads / key_heads). `sinks` [heads], if not null, are scores of one more
// token of each head whose value is zero (gpt-oss). Scores exist for one tile of queries at a time:
// memory is linear in the length.
template <typename Scalar>
void attention(ConstMatrixView<Scalar> query, ConstMatrixView<Scalar> key,
               ConstMatrixView<Scalar> value, const AttentionRule& rule, const Scalar* sinks,
               MatrixView<Scalar> output);

// The gradients of query, key and value, each in its shape, from that of the output, where nothing
// is past. Scores are
// recomputed (as in FlashAttention, arXiv:2205.14135), so memory is linear in the length here, too.
template <typename Scalar>
void attention_backward(ConstMatrixView<Scalar> query, ConstMatrixView<Scalar> key,
                        ConstMatrixView<Scalar> value, const AttentionRule& rule,
                        const Scalar* sinks, ConstMatrixView<Scalar> gradient,
                        MatrixView<Scalar> query_gradient, MatrixView<Scalar> key_gradient,
                        MatrixView<Scalar> value_gradient);

}  // namespace bitwright
