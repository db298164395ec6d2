// Files must not depend on the processor: like weights from their codes, this is compiled without
// fused multiply-adds, and sums are taken in one order.
#include "quant/superblocks.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "linalg/sum.hpp"
#include "linalg/threads.hpp"

namespace bitwright {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float smallest_half = 0x1p-24f;  // above zero
// The scales of scales that are tried: shares of what just reaches the largest value.
constexpr int shrinks = 13;
constexpr double first_shrink = 0.8, last_shrink = 1.1;
constexpr Index fitted_rows = 4;

// Of one superblock.
template <int groups>
struct ScaledCodes {
    Eigen::half d{0.0f};
    Eigen::Array<float, groups, 1> codes = Eigen::Array<float, groups, 1>::Zero();
};

// Finds d and codes with the least Σ costs (values − d codes)². Codes are from `low` to `high` and,
// with `nonzero`, not 0: a scale of 0 would empty its group.
template <int groups, bool nonzero>
struct CodeSearch {
    using Values = Eigen::Array<float, groups, 1>;
    // The precision of errors decides between candidates that are as good: files depend on it.
    using Error = std::conditional_t<nonzero, double, float>;

    const Values& values;
    const Values& costs;
    float low, high;
    bool odd;
    ScaledCodes<groups> best;
    float least = infinity;

    void offer(float candidate, float least_d = smallest_half) {
        Eigen::half d(candidate);
        if (std::abs(static_cast<float>(d)) < least_d)
            d = Eigen::half(std::copysign(least_d, candidate));
        const float wide = static_cast<float>(d);
        if (!std::isfinite(wide)) return;
        Values codes = values / wide;
        codes = odd ? Values(((codes - 1.0f) * 0.5f).rint() * 2.0f + 1.0f) : Values(codes.rint());
        codes = codes.max(low).min(high);
        if constexpr (nonzero) {
            const Values unit = (values * wide < 0.0f).select(Values::Constant(-1.0f), 1.0f);
            codes = (codes == 0.0f).select(unit, codes).max(low == 0.0f ? 1.0f : low).min(high);
        }
        const auto change =
            values.template cast<Error>() - Error(wide) * codes.template cast<Error>();
        const Eigen::Array<Error, groups, 1> parts = costs.template cast<Error>() * change.square();
        const Error error = pairwise_sum(parts);
        if (!(error < Error(least))) return;
        least = static_cast<float>(error);
        best = {d, codes};
    }

    bool run() {
        if (!values.isFinite().all()) return false;
        Index place = 0;
        values.abs().maxCoeff(&place);
        const float extreme = values[place];
        for (const float end : {high, low}) {
            if (end == 0.0f) continue;
            for (int i = 0; i < shrinks; ++i) {
                const double share =
                    i + 1 == shrinks
                        ? last_shrink
                        : i * ((last_shrink - first_shrink) / (shrinks - 1)) + first_shrink;
                offer(extreme / static_cast<float>(static_cast<double>(end) * share));
            }
            // The number after the smallest is twice it.
            if (std::abs(extreme) < 2.0f * smallest_half * end)
                offer(extreme / end, 2.0f * smallest_half);
        }
        if (least == infinity) return false;
        const Values& codes = best.codes;
        const float energy = pairwise_sum(Values(costs * codes * codes));
        offer(pairwise_sum(Values(costs * values * codes)) / (energy > 0.0f ? energy : 1.0f));
        return true;
    }
};

template <int groups, bool nonzero>
bool fit_codes(const Eigen::Array<float, groups, 1>& values,
               const Eigen::Array<float, groups, 1>& costs, const KGrid& grid, int low,
               ScaledCodes<groups>& found) {
    CodeSearch<groups, nonzero> search{
        values, costs, static_cast<float>(low), static_cast<float>(grid.high), grid.odd, {}};
    const bool done = search.run();
    found = search.best;
    return done;
}

// Σ of each group's 16 or 32 channels of what term(channel) says, in NumPy's order.
template <int size, typename Term>
float group_sum(const Term& term) {
    Eigen::Array<float, size, 1> terms;
    for (int i = 0; i < size; ++i) terms[i] = term(i);
    return pairwise_sum(terms);
}

// What an error costs in each group, in units of the largest, so that no sum of squares is more
// than float32 can hold. [in / size]
template <int size>
Eigen::ArrayXf group_costs(const ConstVectorView<float>& importance) {
    int exponent = 0;
    std::frexp(importance.maxCoeff(), &exponent);
    Eigen::ArrayXf costs(importance.size() / size);
    for (Index group = 0; group < costs.size(); ++group)
        costs[group] = group_sum<size>([&](int i) {
                           return std::ldexp(importance[group * size + i], -exponent);
                       }) +
                       1e-30f;
    return costs;
}

// One superblock of symmetric grids, or of affine ones: positive scales and biases of at most zero,
// so that both are unsigned codes.
template <int size, bool affine>
bool fit_superblock(const ConstMatrixView<float>& scales, const ConstMatrixView<float>& biases,
                    const Eigen::ArrayXf& costs, const KGrid& grid, Index row, Index block,
                    SuperblocksView& result) {
    constexpr int groups = static_cast<int>(superblock_size) / size;
    using Values = Eigen::Array<float, groups, 1>;
    const Index first = block * groups;
    const auto of = [&](const ConstMatrixView<float>& matrix) {
        return Values(matrix.row(row).template segment<groups>(first).transpose());
    };
    const Values cost = costs.segment<groups>(first);
    const auto store = [&](const ScaledCodes<groups>& found, auto& d, auto& codes) {
        using Code = std::remove_reference_t<decltype(codes)>::Scalar;
        d(row, block) = found.d;
        codes.row(row).template segment<groups>(first) =
            found.codes.template cast<Code>().transpose();
    };
    Values scale = of(scales);
    ScaledCodes<groups> found;
    if constexpr (!affine) {
        if (!fit_codes<groups, true>(scale, cost, grid, grid.low, found)) return false;
        store(found, result.d, result.scale_codes);
        return true;
    } else {
        const float top = static_cast<float>((1 << grid.bits) - 1);
        const Values one_end = of(biases), other_end = one_end + scale * top;
        if (!one_end.isFinite().all() || !other_end.isFinite().all()) return false;
        const Values bottom = one_end.min(other_end).min(0.0f), peak = one_end.max(other_end);
        scale = (peak - bottom).max(0.0f) / top;
        if (!fit_codes<groups, true>(scale, cost, grid, grid.low, found)) return false;
        store(found, result.d, result.scale_codes);
        // Where the scale has been rounded, the middle of the range stays where it is.
        const Values rounded = static_cast<float>(found.d) * found.codes;
        Values mins = ((rounded - scale) * (top / 2.0f) - bottom).max(0.0f);
        mins = (scale == 0.0f && bottom == 0.0f).select(0.0f, mins);  // so that zeros stay zeros
        if (!fit_codes<groups, false>(mins, cost, grid, 0, found)) return false;
        store(found, result.dmin, result.min_codes);
        return true;
    }
}

template <int size, bool affine>
bool fit_all(const ConstMatrixView<float>& scales, const ConstMatrixView<float>& biases,
             const ConstVectorView<float>& importance, const KGrid& grid, SuperblocksView& result) {
    const Eigen::ArrayXf costs = group_costs<size>(importance);
    std::atomic<bool> held{true};
    parallel_for(scales.rows(), fitted_rows, [&](Index begin, Index end) {
        for (Index row = begin; row < end; ++row)
            for (Index block = 0; block < result.d.cols(); ++block)
                if (!fit_superblock<size, affine>(scales, biases, costs, grid, row, block, result))
                    held = false;
    });
    return held;
}

template <int size, bool affine>
void closed_form_of(const ConstMatrixView<float>& weight,
                    const ConstMatrixView<std::uint8_t>& codes,
                    const ConstVectorView<float>& importance, const KGrid& grid,
                    const float* points, MatrixView<float>& scales, MatrixView<float>& offsets) {
    using Group = Eigen::Array<float, size, 1>;
    const float unit = std::max(importance.maxCoeff(), 1e-30f);
    const Eigen::ArrayXf costs = (importance.array() / unit).max(1e-12f);
    const float zero = points ? 0.0f : static_cast<float>(1 << (grid.bits - 1));
    parallel_for(weight.rows(), fitted_rows, [&](Index begin, Index end) {
        for (Index row = begin; row < end; ++row)
            for (Index group = 0; group < scales.cols(); ++group) {
                const auto here = [&](const auto& matrix) {
                    return Group(matrix.row(row)
                                     .template segment<size>(group * size)
                                     .transpose()
                                     .template cast<float>());
                };
                const Group w = here(weight), cost = costs.segment<size>(group * size);
                Group c = here(codes);
                if (points)
                    c = c.unaryExpr([&](float code) { return points[static_cast<int>(code)]; });
                const float total = pairwise_sum(cost);
                const float centre = affine ? pairwise_sum(Group(cost * c)) / total : zero;
                c -= centre;
                const float energy = pairwise_sum(Group(cost * c * c));
                const bool known = energy > 1e-4f * total;
                const float scale = known ? pairwise_sum(Group(cost * c * w)) / energy
                                          : std::numeric_limits<float>::quiet_NaN();
                scales(row, group) = scale;
                offsets(row, group) =
                    affine ? pairwise_sum(Group(cost * w)) / total - scale * centre : zero;
            }
    });
}

}  // namespace

KGrid KGrid::of(int bits) {
    static constexpr std::array<KGrid, 5> grids{{
        {2, 16, true, 0, 15},
        {3, 16, false, -32, 31},
        {4, 32, true, 0, 63},
        {5, 32, true, 0, 63},
        {6, 16, false, -128, 127},
    }};
    return grids[static_cast<size_t>(bits - 2)];
}

bool fit_superblocks(ConstMatrixView<float> scales, ConstMatrixView<float> biases,
                     ConstVectorView<float> importance, const KGrid& grid, SuperblocksView result) {
    if (!grid.affine && grid.group_size == 32)
        return fit_all<32, false>(scales, biases, importance, grid, result);
    if (!grid.affine) return fit_all<16, false>(scales, biases, importance, grid, result);
    if (grid.group_size == 16) return fit_all<16, true>(scales, biases, importance, grid, result);
    return fit_all<32, true>(scales, biases, importance, grid, result);
}

void closed_form(ConstMatrixView<float> weight, ConstMatrixView<std::uint8_t> codes,
                 ConstVectorView<float> importance, const KGrid& grid, const float* points,
                 MatrixView<float> scales, MatrixView<float> offsets) {
    if (!grid.affine && grid.group_size == 32)
        closed_form_of<32, false>(weight, codes, importance, grid, points, scales, offsets);
    else if (!grid.affine)
        closed_form_of<16, false>(weight, codes, importance, grid, points, scales, offsets);
    else if (grid.group_size == 16)
        closed_form_of<16, true>(weight, codes, importance, grid, points, scales, offsets);
    else
        closed_form_of<32, true>(weight, codes, importance, grid, points, scales, offsets);
}

}  // namespace bitwright
