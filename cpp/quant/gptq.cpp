// GPTQ: Frantar, Ashkboos, Hoefler and Alistarh 2023, arXiv:2210.17323, algorithm 1. The names are
// the paper's: W the weights, U = Cholesky(H⁻¹)ᵀ the upper factor of the inverse Hessian (here that
// of the damped gram), E the errors divided by U's diagonal, B the columns of a block.
#include <algorithm>
#include <vector>

#include "linalg/product.hpp"
#include "linalg/sum.hpp"
#include "quant/lazy_updates.hpp"
#include "quant/quantize.hpp"
#include "quant/slab.hpp"

namespace bitwright {
namespace {

// The state of one solve. `work` holds W with its columns in the order of quantization, column
// after column, rows contiguous, so that a slab of 16 rows of one column is one cache line. A
// column that is quantized holds that of E instead.
template <typename Fitted>
struct Solve {
    Eigen::MatrixXf work;                 // [out padded to 16, in]
    ConstMatrixView<float> upper;         // U [in, in]
    ConstVectorView<std::int32_t> order;  // [in]
    ConstVectorView<float> importance;    // [in]
    const Grid& grid;
    Index block;  // B
    GridsFrom grids;
    QuantizedView result;

    Index slabs() const { return work.rows() / lane_count; }

    // The outer loop of algorithm 1. Its last line is eq. 4: the columns still to come receive
    //     W[:, rest] −= E[:, done] · U[done, rest].
    void all_columns() {
        lazy_updates(
            0, work.cols(), block, [this](Index low, Index high) { columns(low, high); },
            [this](Index low, Index middle, Index high) {
                add_product(work.middleCols(middle, high - middle),
                            work.middleCols(low, middle - low),
                            upper.block(low, middle, middle - low, high - middle), -1.0f);
            },
            no_update);
    }

    // Columns [low, high), whose weights have received the errors of all columns before `low`. Rows
    // are independent.
    void columns(Index low, Index high) {
        parallel_for(slabs(), 4, [&](Index first, Index last) {
            std::vector<float> weights(static_cast<size_t>((high - low) * lane_count));
            std::vector<float> codes(weights.size());
            std::vector<float> importance_here(static_cast<size_t>(high - low));
            for (Index j = low; j < high; ++j)
                importance_here[static_cast<size_t>(j - low)] = importance[order[j]];
            for (Index slab = first; slab < last; ++slab)
                block_of_rows(slab * lane_count, low, high, weights.data(), codes.data(),
                              importance_here.data());
        });
    }

    // The inner loop of algorithm 1, for the 16 rows from `row` on.
    void block_of_rows(Index row, Index low, Index high, float* weights, float* codes,
                       const float* importance_here) {
        const Index count = high - low, group_size = grid.group_size;
        const auto lanes = [](float* data, Index j) {
            return Eigen::Map<Lanes>(data + j * lane_count);
        };
        for (Index j = 0; j < count; ++j)
            lanes(weights, j) = work.col(low + j).segment<lane_count>(row).array();

        Fitted fitted{};
        Index loaded = -1;
        for (Index j = 0; j < count; ++j) {
            const Index group = order[low + j] / group_size;
            if (grids == GridsFrom::progress && (low + j) % group_size == 0) {
                fitted = fit_lanes<Fitted>(grid, weights + j * lane_count, importance_here + j,
                                           group_size);
                store_grid(grid, fitted, row, group, result.scales, result.offsets);
            } else if (grids != GridsFrom::progress && group != loaded) {
                fitted = load_grid<Fitted>(grid, row, group, result.scales, result.offsets);
                loaded = group;
            }
            // Q[:, j] = quant(W[:, j])
            const Lanes code = fitted.encode(lanes(weights, j), grid.top());
            lanes(codes, j) = code;
            // E[:, j] = (W[:, j] − Q[:, j]) / U[j, j]
            const float* factor = upper.data() + (low + j) * upper.cols() + low;
            const Lanes error = (lanes(weights, j) - fitted.decode(code)) / factor[j];
            lanes(weights, j) = error;
            // δ of eq. 2, up to the end of the block: W[:, k] −= E[:, j] · U[j, k]
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

template <typename Fitted, typename Weight>
void solve_gptq(ConstMatrixView<Weight> weight, ConstMatrixView<float> upper,
                ConstVectorView<std::int32_t> order, ConstVectorView<float> importance,
                const Grid& grid, Index block, GridsFrom grids, QuantizedView result,
                VectorView<double> losses) {
    const Index out = weight.rows(), in = weight.cols(), group_size = grid.group_size;
    const Index padded = (out + lane_count - 1) / lane_count * lane_count;
    block = std::min(block, in);
    // A group fitted on the way must lie within one block, where its weights are up to date.
    if (grids == GridsFrom::progress) block = (block + group_size - 1) / group_size * group_size;
    Solve<Fitted> solve{
        Eigen::MatrixXf(padded, in), upper, order, importance, grid, block, grids, result};

    parallel_for(padded / lane_count, 1, [&](Index first, Index last) {
        std::vector<float> slab(static_cast<size_t>(in * lane_count));
        for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
            load_slab(weight, row, 0, in, slab.data());
            for (Index j = 0; j < in; ++j)
                solve.work.col(j).template segment<lane_count>(row) =
                    Eigen::Map<Lanes>(slab.data() + Index{order[j]} * lane_count).matrix();
            if (grids != GridsFrom::original) continue;
            for (Index group = 0; group < result.scales.cols(); ++group) {
                const Index start = group * group_size;
                const auto fitted = fit_lanes<Fitted>(grid, slab.data() + start * lane_count,
                                                      importance.data() + start, group_size);
                store_grid(grid, fitted, row, group, result.scales, result.offsets);
            }
        }
    });

    solve.all_columns();

    // What a step costs is the quotient that eq. 2 minimizes, (W[:, j] − Q[:, j])² / U[j, j]².
    parallel_for(in, 64, [&](Index first, Index last) {
        for (Index j = first; j < last; ++j)
            losses[order[j]] = dot(solve.work.col(j).head(out), solve.work.col(j).head(out));
    });
}

}  // namespace

template <typename Weight>
void quantize_gptq(ConstMatrixView<Weight> weight, ConstMatrixView<float> upper,
                   ConstVectorView<std::int32_t> order, ConstVectorView<float> importance,
                   const Grid& grid, Index block, GridsFrom grids, QuantizedView result,
                   VectorView<double> losses) {
    with_lanes(grid, [&]<typename Fitted>(Fitted) {
        solve_gptq<Fitted>(weight, upper, order, importance, grid, block, grids, result, losses);
    });
}

template void quantize_gptq(ConstMatrixView<float>, ConstMatrixView<float>,
                            ConstVectorView<std::int32_t>, ConstVectorView<float>, const Grid&,
                            Index, GridsFrom, QuantizedView, VectorView<double>);
template void quantize_gptq(ConstMatrixView<Eigen::half>, ConstMatrixView<float>,
                            ConstVectorView<std::int32_t>, ConstVectorView<float>, const Grid&,
                            Index, GridsFrom, QuantizedView, VectorView<double>);
template void quantize_gptq(ConstMatrixView<Eigen::bfloat16>, ConstMatrixView<float>,
                            ConstVectorView<std::int32_t>, ConstVectorView<float>, const Grid&,
                            Index, GridsFrom, QuantizedView, VectorView<double>);

}  // namespace bitwright
