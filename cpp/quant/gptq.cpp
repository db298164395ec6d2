#include <algorithm>
#include <vector>

#include "linalg/product.hpp"
#include "linalg/sum.hpp"
#include "quant/quantize.hpp"
#include "quant/slab.hpp"

namespace bitwright {
namespace {

// The state of one solve. `work` holds the permuted weights column after column, rows contiguous,
// so that a slab of 16 rows of one column is one cache line; a finished column holds its scaled
// error instead.
struct Solve {
    Eigen::MatrixXf work;  // [out padded to 16, in]
    ConstMatrixView<float> upper;
    ConstVectorView<std::int32_t> order;
    ConstVectorView<float> importance;
    const GridRule& rule;
    Index block;
    GridsFrom grids;
    QuantizedView result;

    Index slabs() const { return work.rows() / lane_count; }

    void all_columns() {
        by_halves(
            0, work.cols(), block, [this](Index low, Index high) { columns(low, high); },
            [this](Index low, Index middle, Index high) {
                add_product(work.middleCols(middle, high - middle),
                            work.middleCols(low, middle - low),
                            upper.block(low, middle, middle - low, high - middle), -1.0f);
            },
            no_push);
    }

    // Columns [low, high), whose weights have received the errors of all columns before `low`.
    void columns(Index low, Index high) {
        parallel_for(slabs(), 4, [&](Index first, Index last) {
            std::vector<float> weights(static_cast<size_t>((high - low) * lane_count));
            std::vector<float> codes(weights.size());
            std::vector<float> importance_here(static_cast<size_t>(high - low));
            for (Index j = low; j < high; ++j)
                importance_here[static_cast<size_t>(j - low)] = importance[order[j]];
            for (Index slab = first; slab < last; ++slab)
                leaf(slab * lane_count, low, high, weights.data(), codes.data(),
                     importance_here.data());
        });
    }

    void leaf(Index row, Index low, Index high, float* weights, float* codes,
              const float* importance_here) {
        const Index count = high - low, group_size = result.group_size;
        const auto lanes = [](float* data, Index j) {
            return Eigen::Map<Lanes>(data + j * lane_count);
        };
        for (Index j = 0; j < count; ++j)
            lanes(weights, j) = work.col(low + j).segment<lane_count>(row).array();

        GridLanes grid{};
        Index loaded = -1;
        for (Index j = 0; j < count; ++j) {
            const Index group = order[low + j] / group_size;
            if (grids == GridsFrom::progress && (low + j) % group_size == 0) {
                grid = fit_grid(rule, weights + j * lane_count, importance_here + j, group_size);
                store_grid(rule.grid, grid, row, group, result.scales, result.offsets);
            } else if (grids != GridsFrom::progress && group != loaded) {
                grid = load_grid(rule.grid, row, group, result.scales, result.offsets);
                loaded = group;
            }
            const Lanes code = grid.encode(lanes(weights, j), rule.top());
            lanes(codes, j) = code;
            const float* factor = upper.data() + (low + j) * upper.cols() + low;
            const Lanes error = (lanes(weights, j) - grid.decode(code)) / factor[j];
            lanes(weights, j) = error;
            for (Index k = j + 1; k < count; ++k) lanes(weights, k) -= error * factor[k];
        }
        for (Index j = 0; j < count; ++j)
            work.col(low + j).segment<lane_count>(row).array() = lanes(weights, j);
        const Index rows = std::min<Index>(lane_count, result.codes.rows() - row);
        for (Index lane = 0; lane < rows; ++lane)
            for (Index j = 0; j < count; ++j)
                result.codes(row + lane, order[low + j]) =
                    static_cast<std::uint8_t>(codes[j * lane_count + lane]);
    }
};

}  // namespace

template <typename Weight>
void quantize_gptq(ConstMatrixView<Weight> weight, ConstMatrixView<float> upper,
                   ConstVectorView<std::int32_t> order, ConstVectorView<float> importance,
                   const GridRule& rule, Index block, GridsFrom grids, QuantizedView result,
                   VectorView<double> losses) {
    const Index out = weight.rows(), in = weight.cols(), group_size = result.group_size;
    const Index padded = (out + lane_count - 1) / lane_count * lane_count;
    block = std::min(block, in);
    // A group fitted on the way must lie within one block, where its weights are up to date.
    if (grids == GridsFrom::progress) block = (block + group_size - 1) / group_size * group_size;
    Solve solve{Eigen::MatrixXf(padded, in), upper, order, importance, rule, block, grids, result};

    parallel_for(padded / lane_count, 1, [&](Index first, Index last) {
        std::vector<float> slab(static_cast<size_t>(in * lane_count));
        for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
            load_slab(weight, row, 0, in, slab.data());
            for (Index j = 0; j < in; ++j)
                solve.work.col(j).segment<lane_count>(row) =
                    Eigen::Map<Lanes>(slab.data() + order[j] * lane_count).matrix();
            if (grids != GridsFrom::original) continue;
            for (Index group = 0; group < result.scales.cols(); ++group) {
                const Index start = group * group_size;
                const GridLanes grid = fit_grid(rule, slab.data() + start * lane_count,
                                                importance.data() + start, group_size);
                store_grid(rule.grid, grid, row, group, result.scales, result.offsets);
            }
        }
    });

    solve.all_columns();

    parallel_for(in, 64, [&](Index first, Index last) {
        for (Index j = first; j < last; ++j)
            losses[order[j]] = dot(solve.work.col(j).head(out), solve.work.col(j).head(out));
    });
}

template void quantize_gptq(ConstMatrixView<float>, ConstMatrixView<float>,
                            ConstVectorView<std::int32_t>, ConstVectorView<float>, const GridRule&,
                            Index, GridsFrom, QuantizedView, VectorView<double>);
template void quantize_gptq(ConstMatrixView<Eigen::half>, ConstMatrixView<float>,
                            ConstVectorView<std::int32_t>, ConstVectorView<float>, const GridRule&,
                            Index, GridsFrom, QuantizedView, VectorView<double>);
template void quantize_gptq(ConstMatrixView<Eigen::bfloat16>, ConstMatrixView<float>,
                            ConstVectorView<std::int32_t>, ConstVectorView<float>, const GridRule&,
                            Index, GridsFrom, QuantizedView, VectorView<double>);

}  // namespace bitwright
