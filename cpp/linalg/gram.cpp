#include "linalg/gram.hpp"

#include <algorithm>

#include "linalg/product.hpp"

namespace bitwright {

void accumulate_gram(ConstMatrixView<float> activations, MatrixView<float> gram) {
    add_lower_product(gram, activations.transpose());
}

void mirror_lower(MatrixView<float> matrix) {
    constexpr Index tile =
        64;  // two tiles of 16 KiB: reads and writes both stay in the first cache
    const Index size = matrix.rows();
    const Index tiles = (size + tile - 1) / tile;
    parallel_for(tiles, 1, [&](Index first, Index last) {
        for (Index i = first; i < last; ++i) {
            const Index row = i * tile, rows = std::min(tile, size - row);
            for (Index column = 0; column < row; column += tile)
                matrix.block(column, row, tile, rows) =
                    matrix.block(row, column, rows, tile).transpose();
            auto diagonal = matrix.block(row, row, rows, rows);
            diagonal.triangularView<Eigen::StrictlyUpper>() = diagonal.transpose();
        }
    });
}

}  // namespace bitwright
