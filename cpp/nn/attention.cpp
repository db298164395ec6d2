#include "nn/attention.hpp"

#include <algorithm>

#include "linalg/threads.hpp"

namespace bitwright {

void attention(ConstMatrixView<float> query, ConstMatrixView<float> key,
               ConstMatrixView<float> value, Index length, Index heads, Index key_heads,
               float scale, MatrixView<float> output) {
    constexpr Index tile = 64;  // queries at once
    using Strided = Eigen::Map<const Matrix<float>, 0, Eigen::OuterStride<>>;
    const Index width = query.cols() / heads, batch = query.rows() / length;
    const Index tiles = (length + tile - 1) / tile;
    const auto head_of = [&](const ConstMatrixView<float>& states, Index sample, Index head) {
        return Strided(states.data() + sample * length * states.cols() + head * width, length,
                       width, Eigen::OuterStride<>(states.cols()));
    };
    const SerialBlas serial;
    parallel_for(batch * heads * tiles, 1, [&](Index first, Index last) {
        Matrix<float> scores(tile, length);
        for (Index item = first; item < last; ++item) {
            const Index start = (tiles - 1 - item % tiles) * tile;  // the long rows first
            const Index head = item / tiles % heads, sample = item / tiles / heads;
            const Index key_head = head / (heads / key_heads);
            const Index rows = std::min(tile, length - start), seen = start + rows;
            auto score = scores.topLeftCorner(rows, seen);
            score.noalias() = head_of(query, sample, head).middleRows(start, rows) *
                              head_of(key, sample, key_head).topRows(seen).transpose();
            for (Index i = 0; i < rows; ++i) {
                const Index past = start + i + 1;
                auto row = score.row(i).head(past).array();
                row = ((row - row.maxCoeff()) * scale).exp();
                row /= row.sum();
                score.row(i).tail(seen - past).setZero();
            }
            output.block(sample * length + start, head * width, rows, width).noalias() =
                score * head_of(value, sample, key_head).topRows(seen);
        }
    });
}

}  // namespace bitwright
