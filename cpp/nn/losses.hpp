// What a model's logits say about the next token, one value per row.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// losses [tokens] = −log softmax(logits [tokens, vocabulary])[target], in nats.
void cross_entropy(ConstMatrixView<float> logits, ConstVectorView<std::int32_t> targets,
                   VectorView<double> losses);

// divergences [tokens] = KL(softmax(reference) ‖ softmax(logits)), in nats.
void kl_divergence(ConstMatrixView<float> reference, ConstMatrixView<float> logits,
                   VectorView<double> divergences);

}  // namespace bitwright
