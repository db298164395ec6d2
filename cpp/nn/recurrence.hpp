// Attention without a softmax, as a recurrence over a state per head: the gated delta rule (Yang et
// al. 2024, arXiv:2412.06464, equation 10) and the scan of Mamba-2 (Dao and Gu 2024,
// arXiv:2405.21060).
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

struct RecurrenceRule {
    Index length, heads, key_heads;
};

// For each sample and head, over the state S [width, value_width], which begins as zero or, if
// `states` [batch · heads, width · value_width] is not null, as it is there, where it is left:
//
//     S ← exp(decay) S,   u = strength · (value − Sᵀ key),   S ← S + key uᵀ,   output = Sᵀ query
//
// and without `corrects` u = strength · value. query and key are [batch · length, key_heads ·
// width], value and output [batch · length, heads · value_width], decay (at most 0) and strength
// [batch · length, heads]; head h reads key head h / (heads / key_heads). Computed in chunks, whose
// steps become a triangular system: memory is linear in the length.
template <typename Scalar>
void recurrence(ConstMatrixView<Scalar> query, ConstMatrixView<Scalar> key,
                ConstMatrixView<Scalar> value, ConstMatrixView<Scalar> decay,
                ConstMatrixView<Scalar> strength, const RecurrenceRule& rule, bool corrects,
                Scalar* states, MatrixView<Scalar> output);

template <typename Scalar>
struct RecurrenceGradients {
    MatrixView<Scalar> query, key, value, decay, strength;
};

// The gradients of all five, each in its shape, from that of the output. The states at the starts
// of chunks are kept for one head at a time, the rest is computed again.
template <typename Scalar>
void recurrence_backward(ConstMatrixView<Scalar> query, ConstMatrixView<Scalar> key,
                         ConstMatrixView<Scalar> value, ConstMatrixView<Scalar> decay,
                         ConstMatrixView<Scalar> strength, const RecurrenceRule& rule,
                         bool corrects, ConstMatrixView<Scalar> gradient,
                         RecurrenceGradients<Scalar> gradients);

// output [batch · length, channels] = Σ_j weight[:, j] · states[t − width + 1 + j] (+ bias
// [channels] unless it is null), within each sample of `length` rows: a causal convolution per
// channel.
template <typename Scalar>
void convolve(ConstMatrixView<Scalar> states, ConstMatrixView<Scalar> weight, const Scalar* bias,
              Index length, MatrixView<Scalar> output);

// The gradient of the states, from that of the output.
template <typename Scalar>
void convolve_backward(ConstMatrixView<Scalar> gradient, ConstMatrixView<Scalar> weight,
                       Index length, MatrixView<Scalar> states_gradient);

}  // namespace bitwright
