// Codes and grids that are improved together, in the metric of the gram.
#pragma once

#include "quant/quantize.hpp"

namespace bitwright {

// Lowers tr((W − Ŵ) G (W − Ŵ)ᵀ) from where `result` is, in rounds of two steps of which neither
// raises it. With the codes fixed, scales and biases have a closed form: per row, least squares in
// the metric G with one or two unknowns per group; they are rounded to their dtype, and kept where
// that is no worse. With the grids fixed, one sweep of coordinate descent over the columns gives
// each weight the code that is best given all others. Integer zeros stay, and with `codes_only` all
// grids. weight is [out, in], gram [in, in] and symmetric; objectives [rounds + 1] receives the
// objective before and after every round.
void refine(ConstMatrixView<float> weight, ConstMatrixView<float> gram, const Grid& grid,
            Index rounds, bool codes_only, QuantizedView result, VectorView<double> objectives);

}  // namespace bitwright
