#include "quant/quantize.hpp"
#include "quant/slab.hpp"

namespace bitwright {

template <typename Weight>
void quantize_rtn(ConstMatrixView<Weight> weight, ConstVectorView<float> importance,
                  const GridRule& rule, QuantizedView result) {
    const Index size = result.group_size;
    round_groups(weight, rule, result, [&](const float* slab, Index, Index group) {
        return fit_grid(rule, slab, importance.data() + group * size, size);
    });
}

void encode(ConstMatrixView<float> weight, const GridRule& rule, QuantizedView result) {
    round_groups(weight, rule, result, [&](const float*, Index row, Index group) {
        return load_grid(rule.grid, row, group, result.scales, result.offsets);
    });
}

template void quantize_rtn(ConstMatrixView<float>, ConstVectorView<float>, const GridRule&,
                           QuantizedView);
template void quantize_rtn(ConstMatrixView<Eigen::half>, ConstVectorView<float>, const GridRule&,
                           QuantizedView);
template void quantize_rtn(ConstMatrixView<Eigen::bfloat16>, ConstVectorView<float>,
                           const GridRule&, QuantizedView);

}  // namespace bitwright
