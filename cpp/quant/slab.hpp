// Sixteen rows of a matrix, transposed: element i of lane l is at [i * lane_count + l].
#pragma once

#include <algorithm>

#include "quant/grid.hpp"

namespace bitwright {

// Columns [first, first + count) of 16 rows from `row` on; lanes past the last row repeat it.
template <typename Weight>
void load_slab(const ConstMatrixView<Weight>& matrix, Index row, Index first, Index count,
               float* slab) {
    for (Index lane = 0; lane < lane_count; ++lane) {
        const Weight* source =
            matrix.data() + std::min(row + lane, matrix.rows() - 1) * matrix.cols() + first;
        for (Index i = 0; i < count; ++i)
            slab[i * lane_count + lane] = static_cast<float>(source[i]);
    }
}

// Writes the lanes that are rows of the matrix.
template <typename Scalar>
void store_column(const Lanes& values, Index row, Index column, MatrixView<Scalar>& matrix) {
    const Index rows = std::min<Index>(lane_count, matrix.rows() - row);
    for (Index lane = 0; lane < rows; ++lane)
        matrix(row + lane, column) = static_cast<Scalar>(values[lane]);
}

inline void store_grid(Grid grid, const GridLanes& lanes, Index row, Index group,
                       MatrixView<float>& scales, MatrixView<float>& offsets) {
    store_column(lanes.scale, row, group, scales);
    store_column(grid == Grid::affine ? lanes.bias : lanes.zero, row, group, offsets);
}

}  // namespace bitwright
