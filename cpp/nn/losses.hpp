// Losses of a model's logits for the next token, one value per row.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// losses [tokens] = −log softmax(logits [tokens, vocabulary])[target], in nats.
void cross_entropy(ConstMatrixView<float> logits, ConstVectorView<std::int32_t> targets,
                   VectorView<double> losses);

// ids [tokens], each drawn from softmax(logits [tokens, vocabulary]) as a number `uniform` [tokens]
// from 0 to 1 says: the first token up to which the probabilities add up to more than it.
void draw_tokens(ConstMatrixView<float> logits, ConstVectorView<double> uniform,
                 VectorView<std::int32_t> ids);

// divergences [tokens] = KL(softmax(reference) ‖ softmax(logits)), in nats.
void kl_divergence(ConstMatrixView<float> reference, ConstMatrixView<float> logits,
                   VectorView<double> divergences);

// logits [tokens, vocabulary] = cap · tanh(logits / (divisor · cap)), in place; without a cap (0)
// they are only divided.
template <typename Scalar>
void cap_logits(MatrixView<Scalar> logits, double divisor, double cap);

// gradient [tokens, vocabulary] of the capped logits becomes that of the logits before, in place.
template <typename Scalar>
void cap_logits_backward(ConstMatrixView<Scalar> capped, double divisor, double cap,
                         MatrixView<Scalar> gradient);

// The k most likely tokens of every row of logits [tokens, vocabulary], in ascending order of their
// ids: ids [tokens, k], log_probabilities [tokens, k] under softmax(logits / temperature), and rest
// [tokens], the probability of all others.
template <typename Scalar>
void top_tokens(ConstMatrixView<Scalar> logits, double temperature, MatrixView<std::int32_t> ids,
                MatrixView<Scalar> log_probabilities, VectorView<Scalar> rest);

// A distribution p over the vocabulary, stored as its k most likely tokens and the rest's
// probability.
template <typename Scalar>
struct TopTokens {
    ConstMatrixView<std::int32_t> ids;          // [tokens, k], different in every row
    ConstMatrixView<Scalar> log_probabilities;  // [tokens, k]
    ConstVectorView<Scalar> rest;               // [tokens]
};

enum class Loss { kl, reverse_kl, js, cross_entropy, logits_mse };

// losses [tokens] of q = softmax(logits / temperature) [tokens, vocabulary] against p, and, unless
// it is null, gradient [tokens, vocabulary], `factor` times their gradients with respect to the
// logits:
//   kl             KL(p ‖ q), all tokens that p does not list being one outcome
//   reverse_kl     KL(q ‖ p), likewise
//   js             the mean of KL(p ‖ m) and KL(q ‖ m), m = (p + q) / 2 (Lin 1991)
//   cross_entropy  −log q of the token that came next, whatever p says; none (and 0) where it is
//   negative logits_mse     the mean squared difference of the listed logits, each side less its
//   mean
template <typename Scalar>
void distillation_loss(ConstMatrixView<Scalar> logits, const TopTokens<Scalar>& teacher,
                       ConstVectorView<std::int32_t> next, Loss loss, double temperature,
                       double factor, VectorView<double> losses, Scalar* gradient);

}  // namespace bitwright
