// What AWQ (Lin et al. 2024, arXiv:2306.00978) asks of a weight: how rounding changes it once its
// columns are scaled, and how far to clip it.
#pragma once

#include <functional>

#include "linalg/matrix.hpp"
#include "quant/quantize.hpp"

namespace bitwright {

// The factor of X in eq. 4, change [out, in] = Q(W·diag(s))·diag(1/s) − W: what rounding to the
// grid does to `weight` [out, in] when its columns are multiplied by `scale` [in], each above zero,
// before. `importance` [in] weighs the errors of the unscaled weight in the grid's range search.
void scaled_rounding_change(ConstMatrixView<float> weight, ConstVectorView<float> scale,
                            ConstVectorView<float> importance, const Grid& grid,
                            MatrixView<float> change);

// Every weight of `weight` [out, in] to the nearest point of its group's grid, the grid being that
// of the range [low, high] which minimizes the group's part of the output error,
//     (ŵ − w) G_gg (ŵ − w)ᵀ,
// with G_gg the group's block on the diagonal of `gram` [in, in]; what lies outside is clipped.
// Ranges are those of search_ranges, with the shares 1 − (1 − least) i / steps, i = 0, 1, ….
void quantize_clipped(ConstMatrixView<float> weight, ConstMatrixView<float> gram, const Grid& grid,
                      int steps, float least, QuantizedView result);

// The same for any other measure of error, which is the caller's: errors(found) writes that of each
// row [rows] of the candidate, which lies in `candidate`. `weight` [rows, group_size] holds one
// group of each row and `shares` the shares of max|w|; codes of candidate and result are [rows,
// group_size], scales and offsets [rows, 1].
using RowErrors = std::function<void(VectorView<double> found)>;
void quantize_clipped_by(ConstMatrixView<float> weight, const Grid& grid,
                         ConstVectorView<float> shares, const RowErrors& errors,
                         QuantizedView candidate, QuantizedView result);

}  // namespace bitwright
