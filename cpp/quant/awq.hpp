// What AWQ (Lin et al. 2024) asks of a weight: how rounding changes it once its columns are scaled,
// and how far to clip it.
#pragma once

#include "linalg/matrix.hpp"
#include "quant/quantize.hpp"

namespace bitwright {

// change [out, in] = Q(W·diag(s))·diag(1/s) − W: what rounding to the grid does to `weight`
// [out, in] when its columns are multiplied by `scale` [in], each above zero, before. `importance`
// [in] weighs the errors of the unscaled weight in the rule's range search.
void scaled_rounding_change(ConstMatrixView<float> weight, ConstVectorView<float> scale,
                            ConstVectorView<float> importance, const GridRule& rule,
                            Index group_size, MatrixView<float> change);

// Every weight of `weight` [out, in] to the nearest point of its group's grid, the grid being that
// of the range [low, high] which minimizes the group's part of the output error,
//     (ŵ − w) G_gg (ŵ − w)ᵀ,
// with G_gg the group's block on the diagonal of `gram` [in, in]; what lies outside is clipped.
// First both ends are drawn in to the shares 1 − (1 − least) i / steps, i = 0, 1, …, of max|w|,
// then each by itself.
void quantize_clipped(ConstMatrixView<float> weight, ConstMatrixView<float> gram,
                      const GridRule& rule, int steps, float least, QuantizedView result);

}  // namespace bitwright
