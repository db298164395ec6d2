#include "nn/attention.hpp"

#include <algorithm>

#include "linalg/threads.hpp"

namespace bitwright {

void attention(ConstMatrixView<float> query, ConstMatrixView<float> key,
               ConstMatrixView<float> value, const AttentionRule& rule, MatrixView<float> output) {
    constexpr Index tile = 64;  // queries at once
    using Strided = Eigen::Map<const Matrix<float>, 0, Eigen::OuterStride<>>;
    const Index length = rule.length, heads = rule.heads;
    const Index width = query.cols() / heads, value_width = value.cols() / rule.key_heads;
    const Index batch = query.rows() / length, tiles = (length + tile - 1) / tile;
    const Index window = rule.window > 0 ? rule.window : length;
    const auto head_of = [&](const ConstMatrixView<float>& states, Index sample, Index head,
                             Index channels) {
        return Strided(states.data() + sample * length * states.cols() + head * channels, length,
                       channels, Eigen::OuterStride<>(states.cols()));
    };
    const SerialBlas serial;
    parallel_for(batch * heads * tiles, 1, [&](Index first, Index last) {
        Matrix<float> scores(tile, std::min(length, window + tile));
        for (Index item = first; item < last; ++item) {
            const Index start = (tiles - 1 - item % tiles) * tile;  // the long rows first
            const Index head = item / tiles % heads, sample = item / tiles / heads;
            const Index key_head = head / (heads / rule.key_heads);
            const Index rows = std::min(tile, length - start);
            // The keys that any query of the tile sees: [seen_from, start + rows).
            const Index seen_from = std::max<Index>(0, start - window + 1);
            const Index seen = start + rows - seen_from;
            auto score = scores.topLeftCorner(rows, seen);
            score.noalias() =
                head_of(query, sample, head, width).middleRows(start, rows) *
                head_of(key, sample, key_head, width).middleRows(seen_from, seen).transpose();
            for (Index i = 0; i < rows; ++i) {
                const Index past = start + i + 1 - seen_from;
                const Index skipped = std::max<Index>(0, past - window);
                auto row = score.row(i).segment(skipped, past - skipped).array();
                if (rule.softcap > 0.0f)
                    row = rule.softcap * (row * (rule.scale / rule.softcap)).tanh();
                else
                    row *= rule.scale;
                row = (row - row.maxCoeff()).exp();
                row /= row.sum();
                score.row(i).head(skipped).setZero();
                score.row(i).tail(seen - past).setZero();
            }
            output.block(sample * length + start, head * value_width, rows, value_width).noalias() =
                score * head_of(value, sample, key_head, value_width).middleRows(seen_from, seen);
        }
    });
}

}  // namespace bitwright
