// Codes and grids that are improved together, in the metric of the gram.
#pragma once

#include "quant/quantize.hpp"

namespace bitwright {

// Lowers tr((W − Ŵ) G (W − Ŵ)ᵀ) from where `result` is, in rounds of steps of which none
// raises it. With the codes fixed, scales and biases have a closed form: per row, least squares in
// the metric G with one or two unknowns per group; they are rounded to their dtype, and kept where
// that is no worse. Then one sweep of coordinate descent over the columns: a group gets a new grid
// and new codes where that gains, given all other groups, and each weight the code that is best
// given all others. With `codes_only` grids stay. weight is [out, in], gram [in, in] and symmetric;
// objectives [rounds + 1] receives the objective before and after every round.
void refine(ConstMatrixView<float> weight, ConstMatrixView<float> gram, const Grid& grid,
            Index rounds, bool codes_only, QuantizedView result, VectorView<double> objectives);

}  // namespace bitwright
