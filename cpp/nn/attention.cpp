#include "nn/attention.hpp"

#include <algorithm>
#include <cmath>

#include "linalg/sum.hpp"
#include "linalg/threads.hpp"

namespace bitwright {
namespace {

constexpr Index tile_queries = 64;  // queries at once

// One sample and head of states [batch · length, heads · channels], as [length, channels].
template <typename Scalar>
auto head_of(const ConstMatrixView<Scalar>& states, Index length, Index sample, Index head,
             Index channels) {
    return Eigen::Map<const Matrix<Scalar>, 0, Eigen::OuterStride<>>(
        states.data() + sample * length * states.cols() + head * channels, length, channels,
        Eigen::OuterStride<>(states.cols()));
}
template <typename Scalar>
auto head_of(MatrixView<Scalar>& states, Index length, Index sample, Index head, Index channels) {
    return Eigen::Map<Matrix<Scalar>, 0, Eigen::OuterStride<>>(
        states.data() + sample * length * states.cols() + head * channels, length, channels,
        Eigen::OuterStride<>(states.cols()));
}

// The queries [start, start + rows) and the keys that any of them sees, [seen_from, start + rows).
struct Tile {
    Index start, rows, seen_from, seen;

    Tile(Index index, const AttentionRule& rule)
        : start(index * tile_queries),
          rows(std::min(tile_queries, rule.length - start)),
          seen_from(std::max<Index>(0, rule.past + start - window_of(rule) + 1)),
          seen(rule.past + start + rows - seen_from) {}

    static Index window_of(const AttentionRule& rule) {
        return rule.window > 0 ? std::min(rule.window, rule.seen()) : rule.seen();
    }
    static Index most_seen(const AttentionRule& rule) {
        return std::min(rule.seen(), window_of(rule) + tile_queries);
    }
};

// weights [tile.rows, tile.seen] = the softmax of q · kᵀ and the head's sink, if it has one;
// `slopes`, if not null, gets the derivative of the soft cap at every score.
template <typename Scalar, typename Queries, typename Keys, typename Weights>
void attention_weights(const Queries& queries, const Keys& keys, const Tile& tile,
                       const AttentionRule& rule, const Scalar* sink, Weights& weights,
                       Matrix<Scalar>* slopes) {
    const auto scale = static_cast<Scalar>(rule.scale), cap = static_cast<Scalar>(rule.softcap);
    weights.noalias() = queries.middleRows(tile.start, tile.rows) *
                        keys.middleRows(tile.seen_from, tile.seen).transpose();
    for (Index i = 0; i < tile.rows; ++i) {
        const Index past = rule.past + tile.start + i + 1 - tile.seen_from;
        const Index skipped = std::max<Index>(0, past - Tile::window_of(rule));
        auto row = weights.row(i).segment(skipped, past - skipped).array();
        if (cap > 0) {
            row = (row * (scale / cap)).tanh();
            if (slopes) slopes->row(i).segment(skipped, past - skipped).array() = 1 - row.square();
            row *= cap;
        } else {
            row *= scale;
        }
        const Scalar most = sink ? std::max(row.maxCoeff(), *sink) : row.maxCoeff();
        row = (row - most).exp();
        row /= sink ? sum(row) + std::exp(*sink - most) : sum(row);
        weights.row(i).head(skipped).setZero();
        weights.row(i).tail(tile.seen - past).setZero();
    }
}

}  // namespace

template <typename Scalar>
void attention(ConstMatrixView<Scalar> query, ConstMatrixView<Scalar> key,
               ConstMatrixView<Scalar> value, const AttentionRule& rule, const Scalar* sinks,
               MatrixView<Scalar> output) {
    const Index length = rule.length, heads = rule.heads;
    const Index width = query.cols() / heads, value_width = value.cols() / rule.key_heads;
    const Index batch = query.rows() / length, tiles = (length + tile_queries - 1) / tile_queries;
    parallel_for(batch * heads * tiles, 1, [&](Index first, Index last) {
        Matrix<Scalar> scores(tile_queries, Tile::most_seen(rule));
        for (Index item = first; item < last; ++item) {
            const Tile tile(tiles - 1 - item % tiles, rule);  // the long rows first
            const Index head = item / tiles % heads, sample = item / tiles / heads;
            const Index key_head = head / (heads / rule.key_heads);
            auto weights = scores.topLeftCorner(tile.rows, tile.seen);
            attention_weights<Scalar>(head_of(query, length, sample, head, width),
                                      head_of(key, rule.seen(), sample, key_head, width), tile,
                                      rule, sinks ? sinks + head : nullptr, weights, nullptr);
            head_of(output, length, sample, head, value_width)
                .middleRows(tile.start, tile.rows)
                .noalias() = weights * head_of(value, rule.seen(), sample, key_head, value_width)
                                           .middleRows(tile.seen_from, tile.seen);
        }
    });
}

template <typename Scalar>
void attention_backward(ConstMatrixView<Scalar> query, ConstMatrixView<Scalar> key,
                        ConstMatrixView<Scalar> value, const AttentionRule& rule,
                        const Scalar* sinks, ConstMatrixView<Scalar> gradient,
                        MatrixView<Scalar> query_gradient, MatrixView<Scalar> key_gradient,
                        MatrixView<Scalar> value_gradient) {
    const Index length = rule.length, heads = rule.heads, shared = heads / rule.key_heads;
    const Index width = query.cols() / heads, value_width = value.cols() / rule.key_heads;
    const Index batch = query.rows() / length, tiles = (length + tile_queries - 1) / tile_queries;
    const auto scale = static_cast<Scalar>(rule.scale);
    // Every query head has its own gradients of the keys and values that it shares with others.
    Matrix<Scalar> keys_apart(shared > 1 ? query.rows() : 0, query.cols());
    Matrix<Scalar> values_apart(shared > 1 ? query.rows() : 0, heads * value_width);
    MatrixView<Scalar> key_parts(keys_apart.data(), query.rows(), query.cols());
    MatrixView<Scalar> value_parts(values_apart.data(), query.rows(), heads * value_width);
    parallel_for(batch * heads, 1, [&](Index first, Index last) {
        Matrix<Scalar> scores(tile_queries, Tile::most_seen(rule)), changes(scores), slopes;
        if (rule.softcap > 0) slopes.resize(scores.rows(), scores.cols());
        for (Index item = first; item < last; ++item) {
            const Index head = item % heads, sample = item / heads, key_head = head / shared;
            const auto queries = head_of(query, length, sample, head, width);
            const auto keys = head_of(key, length, sample, key_head, width);
            const auto values = head_of(value, length, sample, key_head, value_width);
            const auto outputs = head_of(gradient, length, sample, head, value_width);
            auto to_queries = head_of(query_gradient, length, sample, head, width);
            auto to_keys =
                head_of(shared > 1 ? key_parts : key_gradient, length, sample, head, width);
            auto to_values = head_of(shared > 1 ? value_parts : value_gradient, length, sample,
                                     head, value_width);
            to_keys.setZero();
            to_values.setZero();
            for (Index index = 0; index < tiles; ++index) {
                const Tile tile(index, rule);
                auto weights = scores.topLeftCorner(tile.rows, tile.seen);
                auto change = changes.topLeftCorner(tile.rows, tile.seen);
                attention_weights<Scalar>(queries, keys, tile, rule, sinks ? sinks + head : nullptr,
                                          weights, rule.softcap > 0 ? &slopes : nullptr);
                const auto above = outputs.middleRows(tile.start, tile.rows);
                to_values.middleRows(tile.seen_from, tile.seen).noalias() +=
                    weights.transpose() * above;
                change.noalias() = above * values.middleRows(tile.seen_from, tile.seen).transpose();
                for (Index i = 0; i < tile.rows; ++i) {
                    auto row = change.row(i).array();
                    const auto weight = weights.row(i).array();
                    row = scale * weight * (row - sum(weight * row));
                }
                if (rule.softcap > 0)
                    // Where nothing is seen the weight is 0, and the slope was never written.
                    change.array() =
                        (weights.array() > 0)
                            .select(
                                change.array() * slopes.topLeftCorner(tile.rows, tile.seen).array(),
                                Scalar(0));
                to_queries.middleRows(tile.start, tile.rows).noalias() =
                    change * keys.middleRows(tile.seen_from, tile.seen);
                to_keys.middleRows(tile.seen_from, tile.seen).noalias() +=
                    change.transpose() * queries.middleRows(tile.start, tile.rows);
            }
        }
    });
    if (shared == 1) return;
    parallel_for(query.rows(), 32, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            for (Index head = 0; head < heads; ++head) {
                auto to_key = key_gradient.row(row).segment(head / shared * width, width);
                auto to_value =
                    value_gradient.row(row).segment(head / shared * value_width, value_width);
                const auto key_part = key_parts.row(row).segment(head * width, width);
                const auto value_part =
                    value_parts.row(row).segment(head * value_width, value_width);
                if (head % shared == 0) {
                    to_key = key_part;
                    to_value = value_part;
                } else {
                    to_key += key_part;
                    to_value += value_part;
                }
            }
        }
    });
}

#define BITWRIGHT_ATTENTION(Scalar)                                                                \
    template void attention(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,                      \
                            ConstMatrixView<Scalar>, const AttentionRule&, const Scalar*,          \
                            MatrixView<Scalar>);                                                   \
    template void attention_backward(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,             \
                                     ConstMatrixView<Scalar>, const AttentionRule&, const Scalar*, \
                                     ConstMatrixView<Scalar>, MatrixView<Scalar>,                  \
                                     MatrixView<Scalar>, MatrixView<Scalar>);
BITWRIGHT_ATTENTION(float)
BITWRIGHT_ATTENTION(double)

}  // namespace bitwright
