#include "quant/awq.hpp"

#include <vector>

#include "quant/slab.hpp"

namespace bitwright {
namespace {

Eigen::Map<Lanes> lanes(std::vector<float>& slab, Index i) {
    return Eigen::Map<Lanes>(slab.data() + i * lane_count);
}

// e B eᵀ in every lane, for the symmetric block B of `gram` that starts at [start, start]: four
// rows of B at a time, so that there are enough independent sums to keep the multipliers busy.
Lanes block_form(const ConstMatrixView<float>& gram, Index start, Index count, const float* error) {
    const auto e = [&](Index i) { return Eigen::Map<const Lanes>(error + i * lane_count); };
    const auto row = [&](Index i) { return gram.data() + (start + i) * gram.cols() + start; };
    Lanes form = Lanes::Zero();
    Index i = 0;
    for (; i + 4 <= count; i += 4) {
        const float *b0 = row(i), *b1 = row(i + 1), *b2 = row(i + 2), *b3 = row(i + 3);
        Lanes s0 = 0.5f * b0[i] * e(i), s1 = Lanes::Zero(), s2 = Lanes::Zero(), s3 = Lanes::Zero();
        for (Index j = 0; j < i; ++j) {
            const Lanes value = e(j);
            s0 += b0[j] * value;
            s1 += b1[j] * value;
            s2 += b2[j] * value;
            s3 += b3[j] * value;
        }
        s1 += b1[i] * e(i) + 0.5f * b1[i + 1] * e(i + 1);
        s2 += b2[i] * e(i) + b2[i + 1] * e(i + 1) + 0.5f * b2[i + 2] * e(i + 2);
        s3 += b3[i] * e(i) + b3[i + 1] * e(i + 1) + b3[i + 2] * e(i + 2) +
              0.5f * b3[i + 3] * e(i + 3);
        form += s0 * e(i) + s1 * e(i + 1) + s2 * e(i + 2) + s3 * e(i + 3);
    }
    for (; i < count; ++i) {
        Lanes sum = 0.5f * row(i)[i] * e(i);
        for (Index j = 0; j < i; ++j) sum += row(i)[j] * e(j);
        form += sum * e(i);
    }
    return 2.0f * form;
}

}  // namespace

void scaled_rounding_change(ConstMatrixView<float> weight, ConstVectorView<float> scale,
                            ConstVectorView<float> importance, const GridRule& rule,
                            Index group_size, MatrixView<float> change) {
    const Index slabs = (weight.rows() + lane_count - 1) / lane_count;
    // An error of the scaled weight is divided by the scale again.
    const Eigen::VectorXf scaled_importance = importance.array() / scale.array().square();
    parallel_for(slabs, 1, [&](Index first, Index last) {
        std::vector<float> slab(static_cast<size_t>(group_size * lane_count));
        for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
            for (Index start = 0; start < weight.cols(); start += group_size) {
                load_slab(weight, row, start, group_size, slab.data());
                for (Index i = 0; i < group_size; ++i) lanes(slab, i) *= scale[start + i];
                const GridLanes grid =
                    fit_grid(rule, slab.data(), scaled_importance.data() + start, group_size);
                for (Index i = 0; i < group_size; ++i) {
                    const Lanes scaled = lanes(slab, i);
                    const Lanes rounded = grid.decode(grid.encode(scaled, rule.top()));
                    store_column(Lanes((rounded - scaled) / scale[start + i]), row, start + i,
                                 change);
                }
            }
        }
    });
}

void quantize_clipped(ConstMatrixView<float> weight, ConstMatrixView<float> gram,
                      const GridRule& rule, int steps, float least, QuantizedView result) {
    const Index size = result.group_size;
    const auto share = [&](int step) {
        return 1.0f - (1.0f - least) * static_cast<float>(step) / static_cast<float>(steps);
    };
    round_groups(weight, rule, result, [&](const float* slab, Index, Index group) {
        std::vector<float> error(static_cast<size_t>(size * lane_count));
        const auto value = [&](Index i) { return Eigen::Map<const Lanes>(slab + i * lane_count); };
        Lanes low = value(0), high = low;
        for (Index i = 1; i < size; ++i) {
            low = low.min(value(i));
            high = high.max(value(i));
        }
        BestGrid best{span_grid(rule, low, high)};
        Lanes best_low = low, best_high = high;
        const auto try_range = [&](const Lanes& bottom, const Lanes& top) {
            range_grids(rule, bottom, top, [&](const GridLanes& candidate) {
                const GridError error_of{candidate, rule.top()};
                for (Index i = 0; i < size; ++i) lanes(error, i) = error_of(value(i));
                const auto better =
                    best.offer(candidate, block_form(gram, group * size, size, error.data()));
                best_low = better.select(bottom, best_low);
                best_high = better.select(top, best_high);
            });
        };
        const Lanes widest = high.max(-low);
        for (int step = 0; step < steps; ++step)
            try_range(low.max(-share(step) * widest), high.min(share(step) * widest));
        const Lanes stretch = other_rounding(rule, low, high);
        if ((stretch != 1.0f).any()) try_range(low * stretch, high * stretch);
        const Lanes top = best_high;
        for (int step = 0; step < steps; step += 2) try_range(share(step) * low, top);
        const Lanes bottom = best_low;
        for (int step = 0; step < steps; step += 2) try_range(bottom, share(step) * high);
        return best.grid;
    });
}

}  // namespace bitwright
