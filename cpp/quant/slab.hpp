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

inline void store_grid(Grid grid, const GridLanes& lanes, Index row, Index group,
                       MatrixView<float>& scales, MatrixView<float>& offsets) {
    store_column(lanes.scale, row, group, scales);
    store_column(grid == Grid::affine ? lanes.bias : lanes.zero, row, group, offsets);
}

inline GridLanes load_grid(Grid grid, Index row, Index group, const MatrixView<float>& scales,
                           const MatrixView<float>& offsets) {
    GridLanes lanes{Lanes::Ones(), Lanes::Zero(), Lanes::Zero()};
    Lanes& offset = grid == Grid::affine ? lanes.bias : lanes.zero;
    const Index rows = std::min<Index>(lane_count, scales.rows() - row);
    for (Index lane = 0; lane < rows; ++lane) {
        lanes.scale[lane] = scales(row + lane, group);
        offset[lane] = offsets(row + lane, group);
    }
    return lanes;
}

// Takes columns [low, high) in order, leaf(low, high) at most `block` at a time. What a left half
// has changed reaches the right one by push(low, middle, high), as one large product at the speed
// of the machine's matrix multiply instead of a thin one per block; back(low, middle, high) takes
// what the right half has changed to the left one.
template <typename Leaf, typename Push, typename Back>
void by_halves(Index low, Index high, Index block, const Leaf& leaf, const Push& push,
               const Back& back) {
    if (high - low <= block) {
        leaf(low, high);
        return;
    }
    const Index blocks = (high - low + block - 1) / block;
    const Index middle = low + (blocks + 1) / 2 * block;
    by_halves(low, middle, block, leaf, push, back);
    push(low, middle, high);
    by_halves(middle, high, block, leaf, push, back);
    back(low, middle, high);
}
inline void no_push(Index, Index, Index) {}

// Rounds every group of the weight to the grid that fit(slab, row, group) returns for 16 rows of
// it.
template <typename Weight, typename Fit>
void round_groups(const ConstMatrixView<Weight>& weight, const GridRule& rule,
                  QuantizedView& result, const Fit& fit) {
    const Index slabs = (weight.rows() + lane_count - 1) / lane_count, size = result.group_size;
    parallel_for(slabs, 1, [&](Index first, Index last) {
        std::vector<float> slab(static_cast<size_t>(size * lane_count));
        for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
            for (Index group = 0; group < result.scales.cols(); ++group) {
                load_slab(weight, row, group * size, size, slab.data());
                const GridLanes grid = fit(slab.data(), row, group);
                store_grid(rule.grid, grid, row, group, result.scales, result.offsets);
                for (Index i = 0; i < size; ++i) {
                    const Eigen::Map<const Lanes> values(slab.data() + i * lane_count);
                    store_column(grid.encode(values, rule.top()), row, group * size + i,
                                 result.codes);
                }
            }
        }
    });
}

}  // namespace bitwright
