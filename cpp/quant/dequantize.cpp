#include "quant/dequantize.hpp"

#include <vector>

#include "linalg/threads.hpp"

namespace bitwright {

void dequantize(ConstMatrixView<std::uint8_t> codes, ConstMatrixView<float> scales,
                const float* zeros, const float* biases, const std::int32_t* groups,
                const float* points, MatrixView<float> weight) {
    const Index in = codes.cols(), count = scales.cols(), group_size = in / count;
    const std::vector<float> none(static_cast<size_t>(count), 0.0f);
    parallel_for(codes.rows(), 8, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            const float* scale = scales.data() + row * count;
            const float* zero = zeros ? zeros + row * count : none.data();
            const float* bias = biases ? biases + row * count : none.data();
            const std::uint8_t* code = codes.data() + row * in;
            float* target = weight.data() + row * in;
            if (points) {
                for (Index i = 0; i < in; ++i)
                    target[i] = scale[groups ? groups[i] : i / group_size] * points[code[i]];
                continue;
            }
            const auto convert = [&](Index i, Index group) {
                target[i] =
                    scale[group] * (static_cast<float>(code[i]) - zero[group]) + bias[group];
            };
            if (groups) {
                for (Index i = 0; i < in; ++i) convert(i, groups[i]);
            } else {
                for (Index group = 0; group < count; ++group)
                    for (Index i = group * group_size; i < (group + 1) * group_size; ++i)
                        convert(i, group);
            }
        }
    });
}

}  // namespace bitwright
