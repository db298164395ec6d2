#include "nn/losses.hpp"

#include <algorithm>
#include <cmath>

#include "linalg/threads.hpp"

namespace bitwright {
namespace {

// log Σ exp(x), in double: a vocabulary has up to 10⁵ terms.
template <typename Row>
double log_sum_exp(const Row& row) {
    const float top = row.maxCoeff();
    return top + std::log((row.array() - top).exp().template cast<double>().sum());
}

}  // namespace

void cross_entropy(ConstMatrixView<float> logits, ConstVectorView<std::int32_t> targets,
                   VectorView<double> losses) {
    parallel_for(logits.rows(), 4, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row)
            losses[row] = log_sum_exp(logits.row(row)) - logits(row, targets[row]);
    });
}

void kl_divergence(ConstMatrixView<float> reference, ConstMatrixView<float> logits,
                   VectorView<double> divergences) {
    parallel_for(logits.rows(), 4, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            const auto p = reference.row(row), q = logits.row(row);
            const double log_p = log_sum_exp(p), log_q = log_sum_exp(q);
            // Σ p (log p − log q), with p's normalization taken out of the sum. Where p vanishes in
            // float32 the term is 0, though both logits may be −∞ there.
            const auto logit = (p.array() - p.maxCoeff()).eval();
            const double difference = (logit < -87.0f)
                                          .select(0.0f, logit.exp() * (p - q).array())
                                          .template cast<double>()
                                          .sum() /
                                      std::exp(log_p - p.maxCoeff());
            const double divergence = difference - log_p + log_q;
            divergences[row] = divergence < 0.0 ? 0.0 : divergence;  // rounding; NaN stays NaN
        }
    });
}

}  // namespace bitwright
