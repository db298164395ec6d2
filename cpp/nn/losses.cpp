#include "nn/losses.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "linalg/sum.hpp"
#include "linalg/threads.hpp"

namespace bitwright {
namespace {

// log Σ exp(x), in double: a vocabulary has up to 10⁵ terms.
template <typename Row>
double log_sum_exp(const Row& row) {
    const auto top = row.maxCoeff();
    return static_cast<double>(top) +
           std::log(sum((row.array() - top).exp().template cast<double>()));
}

constexpr double least_rest = 1e-8;  // probability of all other tokens, for its logarithm
template <typename Scalar>
constexpr Scalar least_log = Scalar(-1e4);  // of a token's probability: 0 · −∞ is not a number

}  // namespace

void cross_entropy(ConstMatrixView<float> logits, ConstVectorView<std::int32_t> targets,
                   VectorView<double> losses) {
    parallel_for(logits.rows(), 4, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row)
            losses[row] = log_sum_exp(logits.row(row)) - logits(row, targets[row]);
    });
}

void draw_tokens(ConstMatrixView<float> logits, ConstVectorView<double> uniform,
                 VectorView<std::int32_t> ids) {
    parallel_for(logits.rows(), 4, [&](Index first, Index last) {
        AlignedRow<float> share(logits.cols());
        for (Index row = first; row < last; ++row) {
            share = logits.row(row).array();
            share = (share - share.maxCoeff()).exp();
            const double wanted = uniform[row] * static_cast<double>(sum(share.cast<double>()));
            double total = 0.0;
            Index token = 0;
            while (token + 1 < share.size() && !((total += share[token]) > wanted)) ++token;
            ids[row] = static_cast<std::int32_t>(token);
        }
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
            const double difference = sum((logit < -87.0f)
                                              .select(0.0f, logit.exp() * (p - q).array())
                                              .template cast<double>()) /
                                      std::exp(log_p - p.maxCoeff());
            const double divergence = difference - log_p + log_q;
            divergences[row] = divergence < 0.0 ? 0.0 : divergence;  // rounding; NaN stays NaN
        }
    });
}

template <typename Scalar>
void cap_logits(MatrixView<Scalar> logits, double divisor, double cap) {
    const auto factor = static_cast<Scalar>(1 / (cap > 0 ? divisor * cap : divisor));
    parallel_for(logits.rows(), 4, [&](Index first, Index last) {
        AlignedRow<Scalar> values(logits.cols());
        for (Index row = first; row < last; ++row) {
            values = factor * logits.row(row).array();
            if (cap > 0) values = static_cast<Scalar>(cap) * values.tanh();
            logits.row(row).array() = values;
        }
    });
}

template <typename Scalar>
void cap_logits_backward(ConstMatrixView<Scalar> capped, double divisor, double cap,
                         MatrixView<Scalar> gradient) {
    const auto factor = static_cast<Scalar>(1 / divisor);
    parallel_for(capped.rows(), 4, [&](Index first, Index last) {
        AlignedRow<Scalar> values(capped.cols());
        for (Index row = first; row < last; ++row) {
            values.setConstant(factor);
            if (cap > 0)
                values *= 1 - (capped.row(row).array() / static_cast<Scalar>(cap)).square();
            gradient.row(row).array() *= values;
        }
    });
}

template <typename Scalar>
void top_tokens(ConstMatrixView<Scalar> logits, double temperature, MatrixView<std::int32_t> ids,
                MatrixView<Scalar> log_probabilities, VectorView<Scalar> rest) {
    const Index vocabulary = logits.cols(), count = ids.cols();
    parallel_for(logits.rows(), 4, [&](Index first, Index last) {
        std::vector<std::int32_t> order(static_cast<std::size_t>(vocabulary));
        for (Index row = first; row < last; ++row) {
            const auto values = logits.row(row);
            std::iota(order.begin(), order.end(), 0);
            // Of equal logits the smaller id comes first, so that the choice is always the same.
            std::nth_element(order.begin(), order.begin() + count, order.end(),
                             [&](std::int32_t a, std::int32_t b) {
                                 return values[a] > values[b] || (values[a] == values[b] && a < b);
                             });
            std::sort(order.begin(), order.begin() + count);
            const auto scaled = (values.array() / static_cast<Scalar>(temperature)).eval();
            const double normalizer = log_sum_exp(scaled);
            for (Index place = 0; place < count; ++place) {
                const std::int32_t id = order[static_cast<std::size_t>(place)];
                ids(row, place) = id;
                log_probabilities(row, place) = static_cast<Scalar>(scaled[id] - normalizer);
            }
            double others = 0.0;  // summed up by themselves: 1 − Σ p would be all rounding error
            for (Index place = count; place < vocabulary; ++place)
                others += std::exp(scaled[order[static_cast<std::size_t>(place)]] - normalizer);
            rest[row] = static_cast<Scalar>(others);
        }
    });
}

template <typename Scalar>
void distillation_loss(ConstMatrixView<Scalar> logits, const TopTokens<Scalar>& teacher,
                       ConstVectorView<std::int32_t> next, Loss loss, double temperature,
                       double factor, VectorView<double> losses, Scalar* gradient) {
    using Row = AlignedRow<Scalar>;
    const Index vocabulary = logits.cols(), count = teacher.ids.cols();
    // d loss / d logits = (d loss / d z) / temperature, z = logits / temperature
    const auto slope = static_cast<Scalar>(factor / temperature);
    parallel_for(logits.rows(), 4, [&](Index first, Index last) {
        Row q(vocabulary), log_p(count), log_q(count), result(vocabulary);
        const auto one_row = [&](Index row) {
            const auto ids = teacher.ids.row(row);
            q = logits.row(row).array() / static_cast<Scalar>(temperature);
            const double normalizer = log_sum_exp(q);
            for (Index place = 0; place < count; ++place)
                log_q[place] = static_cast<Scalar>(q[ids[place]] - normalizer);
            log_q = log_q.max(least_log<Scalar>);
            if (loss == Loss::logits_mse) {
                log_p = teacher.log_probabilities.row(row).array();
                log_q -= log_p;
                log_q -= mean(log_q);
                losses[row] = mean(log_q.template cast<double>().square());
                if (!gradient) return;
                result.setZero();
                for (Index place = 0; place < count; ++place)
                    result[ids[place]] = slope * (2 / static_cast<Scalar>(count)) * log_q[place];
                return;
            }
            q = (q - static_cast<Scalar>(normalizer)).exp();
            if (loss == Loss::cross_entropy) {
                const std::int32_t target = next[row];
                losses[row] = 0.0;
                if (gradient) result.setZero();
                if (target < 0) return;
                losses[row] = normalizer - static_cast<double>(logits(row, target)) / temperature;
                if (!gradient) return;
                result = slope * q;
                result[target] -= slope;
                return;
            }
            // Log-probabilities are stored in few bits: what they add up to is known better.
            const double rest = count < vocabulary ? static_cast<double>(teacher.rest[row]) : 0.0;
            log_p = teacher.log_probabilities.row(row).array();
            log_p += static_cast<Scalar>(std::log1p(-rest) - log_sum_exp(log_p));
            log_p = log_p.max(least_log<Scalar>);
            const Row p = log_p.exp();
            // The rest as one outcome; every token of it shares in its gradient by its own q.
            double other = 0.0;
            if (count < vocabulary) {
                result = q;
                for (Index place = 0; place < count; ++place) result[ids[place]] = 0;
                other = std::max(static_cast<double>(sum(result)), least_rest);
            }
            const double log_rest = std::log(std::max(rest, least_rest));
            const double log_other = std::log(std::max(other, least_rest));
            const bool open = count < vocabulary;
            double total = 0.0;
            if (loss == Loss::kl) {
                total = static_cast<double>(sum(p * (log_p - log_q)));
                if (open) total += rest * (log_rest - log_other);
                losses[row] = total;
                if (!gradient) return;
                // q − p, the rest's p being dealt out in proportion to q.
                result = slope * q;
                if (open) result *= static_cast<Scalar>(1 - rest / other);
                for (Index place = 0; place < count; ++place)
                    result[ids[place]] = slope * (q[ids[place]] - p[place]);
            } else {
                // Each loss is Σ q r + Σ p …, with d loss / d z = q (r − Σ q r).
                const bool reverse = loss == Loss::reverse_kl;
                const Row listed = log_q.exp();
                Row ratio(count);
                double other_ratio = 0.0;
                if (reverse) {
                    ratio = log_q - log_p;
                    if (open) other_ratio = log_other - log_rest;
                } else {
                    const Row middle =
                        (Scalar(0.5) * (p + listed)).max(std::numeric_limits<Scalar>::min()).log();
                    ratio = Scalar(0.5) * (log_q - middle);
                    const double log_mean = std::log(std::max(0.5 * (rest + other), least_rest));
                    if (open) other_ratio = 0.5 * (log_other - log_mean);
                    total = static_cast<double>(sum(Scalar(0.5) * p * (log_p - middle)));
                    if (open) total += 0.5 * rest * (log_rest - log_mean);
                }
                double expected = static_cast<double>(sum(listed * ratio));
                if (open) expected += other * other_ratio;
                total += expected;
                losses[row] = total;
                if (!gradient) return;
                result = slope * q * static_cast<Scalar>(other_ratio - expected);
                for (Index place = 0; place < count; ++place)
                    result[ids[place]] =
                        slope * listed[place] * (ratio[place] - static_cast<Scalar>(expected));
            }
        };
        for (Index row = first; row < last; ++row) {
            one_row(row);
            if (gradient) Eigen::Map<Row>(gradient + row * vocabulary, vocabulary) = result;
        }
    });
}

#define BITWRIGHT_LOSSES(Scalar)                                                         \
    template void cap_logits(MatrixView<Scalar>, double, double);                        \
    template void cap_logits_backward(ConstMatrixView<Scalar>, double, double,           \
                                      MatrixView<Scalar>);                               \
    template void top_tokens(ConstMatrixView<Scalar>, double, MatrixView<std::int32_t>,  \
                             MatrixView<Scalar>, VectorView<Scalar>);                    \
    template void distillation_loss(ConstMatrixView<Scalar>, const TopTokens<Scalar>&,   \
                                    ConstVectorView<std::int32_t>, Loss, double, double, \
                                    VectorView<double>, Scalar*);
BITWRIGHT_LOSSES(float)
BITWRIGHT_LOSSES(double)

}  // namespace bitwright
