#include "quant/quantize.hpp"
#include "quant/slab.hpp"

namespace bitwright {

template <typename Weight>
void quantize_rtn(ConstMatrixView<Weight> weight, ConstVectorView<float> importance,
                  const Grid& grid, QuantizedView result) {
    const Index size = grid.group_size;
    with_lanes(grid, [&]<typename Fitted>(Fitted) {
        fit_groups(weight, grid, result, [&](const float* slab, Index, Index group) {
            return fit_lanes<Fitted>(grid, slab, importance.data() + group * size, size);
        });
    });
}

void encode(ConstMatrixView<float> weight, ConstMatrixView<float> scales,
            ConstMatrixView<float> offsets, const Grid& grid, MatrixView<std::uint8_t> codes) {
    with_lanes(grid, [&]<typename Fitted>(Fitted) {
        round_groups(weight, grid, codes, [&](const float*, Index row, Index group) {
            return load_grid<Fitted>(grid, row, group, scales, offsets);
        });
    });
}

template void quantize_rtn(ConstMatrixView<float>, ConstVectorView<float>, const Grid&,
                           QuantizedView);
template void quantize_rtn(ConstMatrixView<Eigen::half>, ConstVectorView<float>, const Grid&,
                           QuantizedView);
template void quantize_rtn(ConstMatrixView<Eigen::bfloat16>, ConstVectorView<float>, const Grid&,
                           QuantizedView);

}  // namespace bitwright
