// Sixteen rows of a matrix, transposed: element i of lane l is at [i * lane_count + l].
#pragma once

#include <algorithm>
#include <vector>

#include "linalg/threads.hpp"
#include "quant/quantize.hpp"

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

template <typename Fitted>
void store_grid(const Grid& grid, const Fitted& lanes, Index row, Index group,
                MatrixView<float>& scales, MatrixView<float>& offsets) {
    store_column(lanes.scale, row, group, scales);
    if constexpr (std::is_same_v<Fitted, TableLanes>)
        store_column(Lanes(Lanes::Zero()), row, group, offsets);
    else
        store_column(grid.kind == GridKind::affine ? lanes.bias : lanes.zero, row, group, offsets);
}

template <typename Map>
GridLanes load_affine(const Grid& grid, Index row, Index group, const Map& scales,
                      const Map& offsets) {
    GridLanes lanes{Lanes::Ones(), Lanes::Zero(), Lanes::Zero()};
    Lanes& offset = grid.kind == GridKind::affine ? lanes.bias : lanes.zero;
    const Index rows = std::min<Index>(lane_count, scales.rows() - row);
    for (Index lane = 0; lane < rows; ++lane) {
        lanes.scale[lane] = scales(row + lane, group);
        offset[lane] = offsets(row + lane, group);
    }
    return lanes;
}

// scales and offsets are maps [out, groups].
template <typename Fitted, typename Map>
Fitted load_grid(const Grid& grid, Index row, Index group, const Map& scales, const Map& offsets) {
    if constexpr (std::is_same_v<Fitted, TableLanes>) {
        TableLanes lanes{Lanes::Zero(), &grid.table};
        for (Index lane = 0; lane < std::min<Index>(lane_count, scales.rows() - row); ++lane)
            lanes.scale[lane] = scales(row + lane, group);
        return lanes;
    } else {
        return load_affine(grid, row, group, scales, offsets);
    }
}

// Rounds every group of the weight to the grid that grid_of(slab, row, group) returns for 16 rows
// of it.
template <typename Weight, typename GridOf>
void round_groups(const ConstMatrixView<Weight>& weight, const Grid& grid,
                  MatrixView<std::uint8_t>& codes, const GridOf& grid_of) {
    const Index slabs = (weight.rows() + lane_count - 1) / lane_count, size = grid.group_size;
    parallel_for(slabs, 1, [&](Index first, Index last) {
        std::vector<float> slab(static_cast<size_t>(size * lane_count));
        for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
            for (Index group = 0; group < weight.cols() / size; ++group) {
                load_slab(weight, row, group * size, size, slab.data());
                const auto fitted = grid_of(slab.data(), row, group);
                for (Index i = 0; i < size; ++i) {
                    const Eigen::Map<const Lanes> values(slab.data() + i * lane_count);
                    store_column(fitted.encode(values, grid.top()), row, group * size + i, codes);
                }
            }
        }
    });
}

// The same for grids that fit(slab, row, group) finds, which are part of the result.
template <typename Weight, typename Fit>
void fit_groups(const ConstMatrixView<Weight>& weight, const Grid& grid, QuantizedView& result,
                const Fit& fit) {
    round_groups(weight, grid, result.codes, [&](const float* slab, Index row, Index group) {
        const auto fitted = fit(slab, row, group);
        store_grid(grid, fitted, row, group, result.scales, result.offsets);
        return fitted;
    });
}

}  // namespace bitwright
