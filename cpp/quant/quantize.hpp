// Weights to codes: round-to-nearest and GPTQ.
#pragma once

#include "linalg/matrix.hpp"
#include "quant/grid.hpp"

namespace bitwright {

// What a method writes. Groups are the grid's group_size consecutive input channels of one row;
// groups = in / group_size. `offsets` holds biases for affine grids and zeros for the other two.
struct QuantizedView {
    MatrixView<std::uint8_t> codes;  // [out, in]
    MatrixView<float> scales;        // [out, groups], exact in the grid's scale type
    MatrixView<float> offsets;       // [out, groups]
};

// Every weight to the nearest point of its group's grid. `importance` [in] weighs the errors of the
// range search. Weight is float, Eigen::half or Eigen::bfloat16.
template <typename Weight>
void quantize_rtn(ConstMatrixView<Weight> weight, ConstVectorView<float> importance,
                  const Grid& grid, QuantizedView result);

// Codes [out, in]: every weight of `weight` [out, in] to the nearest point of its group's grid,
// whose scales and offsets [out, groups] are given.
void encode(ConstMatrixView<float> weight, ConstMatrixView<float> scales,
            ConstMatrixView<float> offsets, const Grid& grid, MatrixView<std::uint8_t> codes);

// GPTQ (Frantar et al. 2023): columns in the given order, each one's rounding error spread over the
// columns still to come. `upper` [in, in] is the factor of the permuted gram (inverse_factor.hpp),
// `importance` [in] the gram's diagonal, `block` the number of columns between two lazy updates.
// Grids are those that `result` holds, fitted to the original weights, or fitted when a group's
// first column is reached; an order other than 0, 1, 2 … excludes the last. `losses` [in] receives,
// per column, its part of tr((W − Ŵ)(G + D)(W − Ŵ)ᵀ), exactly.
enum class GridsFrom { result, original, progress };
template <typename Weight>
void quantize_gptq(ConstMatrixView<Weight> weight, ConstMatrixView<float> upper,
                   ConstVectorView<std::int32_t> order, ConstVectorView<float> importance,
                   const Grid& grid, Index block, GridsFrom grids, QuantizedView result,
                   VectorView<double> losses);

}  // namespace bitwright
