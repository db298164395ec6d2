// Codes and grids that are improved in the metrics of a layer's inputs and outputs together.
#pragma once

#include "quant/quantize.hpp"

namespace bitwright {

// Lowers tr(O Δ G Δᵀ), Δ = W − Ŵ, from where `result` is, in steps of which none raises it. G [in,
// in] is the inputs' gram and O the outputs' own metric, in diagonal blocks of so many rows as
// `outputs` [out, width] has columns: row i of it is row i of its block. A sweep goes over the
// groups. In each, the first `fits` sweeps give every row its best scale and bias (or integer
// zero), given all others and rounded to their dtype. Then come the codes, column by column:
// in the first sweeps nearest planes for a whole column where they gain, and then each code's best
// value, given all others. weight is [out, in]; objectives [sweeps + 1] receives the objective
// before and after every sweep.
void refine_two_sided(ConstMatrixView<float> weight, ConstMatrixView<float> gram,
                      ConstMatrixView<float> outputs, const Grid& grid, Index sweeps, Index fits,
                      QuantizedView result, VectorView<double> objectives);

}  // namespace bitwright
