#include <vector>

#include "linalg/threads.hpp"
#include "quant/quantize.hpp"
#include "quant/slab.hpp"

namespace bitwright {

template <typename Weight>
void quantize_rtn(ConstMatrixView<Weight> weight, ConstVectorView<float> importance,
                  const GridRule& rule, QuantizedView result) {
    const Index rows = weight.rows(), group_size = result.group_size;
    parallel_for((rows + lane_count - 1) / lane_count, 1, [&](Index first, Index last) {
        std::vector<float> slab(static_cast<size_t>(group_size * lane_count));
        for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
            for (Index group = 0; group < result.scales.cols(); ++group) {
                const Index start = group * group_size;
                load_slab(weight, row, start, group_size, slab.data());
                const GridLanes grid =
                    fit_grid(rule, slab.data(), importance.data() + start, group_size);
                store_grid(rule.grid, grid, row, group, result.scales, result.offsets);
                for (Index i = 0; i < group_size; ++i) {
                    const Eigen::Map<const Lanes> values(slab.data() + i * lane_count);
                    store_column(grid.encode(values, rule.top()), row, start + i, result.codes);
                }
            }
        }
    });
}

template void quantize_rtn(ConstMatrixView<float>, ConstVectorView<float>, const GridRule&,
                           QuantizedView);
template void quantize_rtn(ConstMatrixView<Eigen::half>, ConstVectorView<float>, const GridRule&,
                           QuantizedView);
template void quantize_rtn(ConstMatrixView<Eigen::bfloat16>, ConstVectorView<float>,
                           const GridRule&, QuantizedView);

}  // namespace bitwright
