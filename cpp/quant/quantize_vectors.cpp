#include "quant/quantize_vectors.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "linalg/product.hpp"
#include "linalg/sum.hpp"
#include "linalg/threads.hpp"
#include "quant/codebook_search.hpp"
#include "quant/lazy_updates.hpp"
#include "quant/slab.hpp"

namespace bitwright {
namespace {

constexpr Index scaled_rows = 4;
constexpr int scale_trials = 12;  // scales of a group

// A group of weights, rounded to the vectors that are nearest under one scale.
struct VectorGroup {
    const UnitSearch& search;
    const float* weights;
    const UnitMetric* metrics;  // of its units
    Index units;
    std::vector<UnitChoice> choices, others;

    // Σ importance weight · point, Σ importance point², and the least Σ importance (w − s·p)².
    struct Sums {
        float by_weight = 0.0f, by_point = 0.0f, energy = 0.0f;
        float cost(float scale) const {
            return energy - 2.0f * scale * by_weight + scale * scale * by_point;
        }
    };

    // Units of groups that are moved as a whole go the way that costs less.
    void choose(float scale) {
        if (search.type.signs != Signs::moved_groups) return choose(scale, either_way, choices);
        choose(scale, 0, choices);
        choose(scale, 1, others);
        if (total(others) < total(choices)) choices.swap(others);
    }
    Sums sums() const {
        Sums found;
        for (Index unit = 0; unit < units; ++unit)
            for (size_t i = 0; i < unit_size; ++i) {
                const float w = weights[unit * unit_size + static_cast<Index>(i)];
                const float p = choices[static_cast<size_t>(unit)].points[i],
                            h = weight_of(unit, i);
                found.by_weight += h * w * p;
                found.by_point += h * p * p;
                found.energy += h * w * w;
            }
        return found;
    }

  private:
    float weight_of(Index unit, size_t i) const {
        const auto width = static_cast<size_t>(search.type.vectors().width);
        return metrics[unit].cost[i / width * width * width + i % width * (width + 1)];
    }
    void choose(float scale, int down, std::vector<UnitChoice>& found) const {
        for (Index unit = 0; unit < units; ++unit) {
            std::array<float, unit_size> scaled{};
            for (size_t i = 0; i < unit_size; ++i)
                scaled[i] = scale == 0.0f
                                ? 0.0f
                                : weights[unit * unit_size + static_cast<Index>(i)] / scale;
            found[static_cast<size_t>(unit)] = search.run(scaled.data(), metrics[unit], down);
        }
    }
    static float total(const std::vector<UnitChoice>& found) {
        float cost = 0.0f;
        for (const UnitChoice& each : found) cost += each.cost;
        return cost;
    }
};

std::vector<UnitMetric> diagonal_metrics(const ConstVectorView<float>& importance,
                                         const CodebookType& type) {
    // In units of the largest, so that no sum is more than float32 can hold.
    int exponent = 0;
    std::frexp(importance.maxCoeff(), &exponent);
    std::vector<UnitMetric> metrics;
    for (Index first = 0; first < importance.size(); first += unit_size) {
        std::array<float, unit_size> here{};
        for (size_t i = 0; i < unit_size; ++i)
            here[i] = std::ldexp(importance[first + static_cast<Index>(i)], -exponent);
        metrics.push_back(diagonal_metric(here.data(), type));
    }
    return metrics;
}

// body(row, group, the group)
template <typename Body>
void each_group(const ConstMatrixView<float>& weight, const ConstVectorView<float>& importance,
                const CodebookType& type, const Body& body) {
    const UnitSearch search(type);
    const auto metrics = diagonal_metrics(importance, type);
    const Index units = type.group_size / unit_size;
    parallel_for(weight.rows(), scaled_rows, [&](Index begin, Index end) {
        VectorGroup group{search, nullptr, nullptr, units, std::vector<UnitChoice>(size_t(units)),
                          {}};
        group.others = group.choices;
        for (Index row = begin; row < end; ++row)
            for (Index i = 0; i < weight.cols() / type.group_size; ++i) {
                group.weights = weight.data() + row * weight.cols() + i * type.group_size;
                group.metrics = metrics.data() + i * units;
                body(row, i, group);
            }
    });
}

// The state of one solve, as in gptq.cpp.
struct VectorSolve {
    Eigen::MatrixXf work;  // [out padded to 16, in]
    ConstMatrixView<float> upper;
    ConstVectorView<std::int32_t> order;
    ConstMatrixView<float> scales;
    const UnitSearch& search;
    std::vector<UnitMetric> metrics;  // of the units in the order of quantization
    MatrixView<std::uint8_t> codes;

    void columns(Index low, Index high) {
        parallel_for(work.rows() / lane_count, 1, [&](Index first, Index last) {
            std::vector<float> weights(static_cast<size_t>((high - low) * lane_count));
            for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
                using Rows = Eigen::Map<Matrix<float>>;
                Rows rows(weights.data(), lane_count, high - low);
                rows = work.block(row, low, lane_count, high - low);
                for (Index lane = 0; lane < std::min<Index>(lane_count, codes.rows() - row); ++lane)
                    columns_of_row(row + lane, low, high, rows.row(lane).data());
                work.block(row, low, lane_count, high - low) = rows;
            }
        });
    }

    // `weights` [high − low] become the errors divided by U's diagonal.
    void columns_of_row(Index row, Index low, Index high, float* weights) {
        const Index count = high - low;
        for (Index first = 0; first < count; first += unit_size) {
            const Index column = order[low + first];
            const float scale = scales(row, column / search.type.group_size);
            std::uint8_t* stored = codes.data() + row * codes.cols() + column;
            std::array<float, unit_size> points{};
            if (scale != 0.0f) {
                std::array<float, unit_size> scaled{};
                for (size_t i = 0; i < unit_size; ++i)
                    scaled[i] = weights[first + static_cast<Index>(i)] / scale;
                const int down =
                    search.type.signs == Signs::moved_groups ? stored[0] % 2 == 0 : either_way;
                const UnitChoice choice = search.run(
                    scaled.data(), metrics[static_cast<size_t>((low + first) / unit_size)], down);
                std::copy(choice.codes.begin(), choice.codes.end(), stored);
                points = choice.points;
            }
            for (Index i = 0; i < unit_size; ++i) {
                const Index j = first + i;
                const float* factor = upper.data() + (low + j) * upper.cols() + low;
                const float error =
                    (weights[j] - scale * points[static_cast<size_t>(i)]) / factor[j];
                weights[j] = error;
                for (Index k = j + 1; k < count; ++k) weights[k] -= error * factor[k];
            }
        }
    }
};

}  // namespace

void vector_scales(ConstMatrixView<float> weight, ConstVectorView<float> importance,
                   const CodebookType& type, bool search, MatrixView<float> scales) {
    const float top = type.point(static_cast<std::uint8_t>(type.points() - 1));
    // Few magnitudes have the largest weights clipped more.
    const float least = type.is_moved() ? 0.35f : type.vectors().base() == 3 ? 0.6f : 0.75f;
    const float most = type.is_moved() ? 1.0f : 1.2f;
    each_group(weight, importance, type, [&](Index row, Index i, VectorGroup& group) {
        float largest = 0.0f;
        for (Index j = 0; j < type.group_size; ++j)
            largest = std::max(largest, std::abs(group.weights[j]));
        float best = largest / top, lowest = std::numeric_limits<float>::infinity();
        for (int trial = 0; search && largest > 0.0f && trial < scale_trials; ++trial) {
            const float share =
                least + (most - least) * static_cast<float>(trial) / (scale_trials - 1);
            float scale = largest / top * share;
            group.choose(scale);
            const auto sums = group.sums();
            if (sums.by_weight > 0.0f && sums.by_point > 0.0f)
                scale = sums.by_weight / sums.by_point;
            const float cost = sums.cost(scale);
            if (!(cost < lowest)) continue;
            lowest = cost;
            best = scale;
        }
        scales(row, i) = best;
    });
}

void encode_vectors(ConstMatrixView<float> weight, ConstMatrixView<float> scales,
                    ConstVectorView<float> importance, const CodebookType& type,
                    MatrixView<std::uint8_t> codes) {
    each_group(weight, importance, type, [&](Index row, Index i, VectorGroup& group) {
        group.choose(scales(row, i));
        for (Index unit = 0; unit < group.units; ++unit)
            std::copy_n(group.choices[static_cast<size_t>(unit)].codes.data(), unit_size,
                        codes.data() + row * codes.cols() + i * type.group_size + unit * unit_size);
    });
}

bool are_units(ConstVectorView<std::int32_t> order) {
    for (Index j = 0; j < order.size(); ++j)
        if (order[j] % unit_size != j % unit_size ||
            order[j] != order[j - j % unit_size] + j % unit_size)
            return false;
    return true;
}

void quantize_vectors(ConstMatrixView<float> weight, ConstMatrixView<float> upper,
                      ConstVectorView<std::int32_t> order, ConstMatrixView<float> scales,
                      const CodebookType& type, Index block, MatrixView<std::uint8_t> codes,
                      VectorView<double> losses) {
    const Index out = weight.rows(), in = weight.cols();
    const Index padded = (out + lane_count - 1) / lane_count * lane_count;
    block = std::min((block + unit_size - 1) / unit_size * unit_size, in);
    const UnitSearch search(type);
    VectorSolve solve{Eigen::MatrixXf(padded, in), upper, order, scales, search, {}, codes};
    for (Index first = 0; first < in; first += unit_size)
        solve.metrics.push_back(unit_metric(upper.data() + first * (in + 1), in, type));
    parallel_for(padded / lane_count, 1, [&](Index first, Index last) {
        std::vector<float> slab(static_cast<size_t>(in * lane_count));
        for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
            load_slab(weight, row, 0, in, slab.data());
            for (Index j = 0; j < in; ++j)
                solve.work.col(j).segment<lane_count>(row) =
                    Eigen::Map<Lanes>(slab.data() + Index{order[j]} * lane_count).matrix();
        }
    });
    lazy_updates(
        0, in, block, [&](Index low, Index high) { solve.columns(low, high); },
        [&](Index low, Index middle, Index high) {
            add_product(solve.work.middleCols(middle, high - middle),
                        solve.work.middleCols(low, middle - low),
                        upper.block(low, middle, middle - low, high - middle), -1.0f);
        },
        no_update);
    parallel_for(in, 64, [&](Index first, Index last) {
        for (Index j = first; j < last; ++j)
            losses[order[j]] = dot(solve.work.col(j).head(out), solve.work.col(j).head(out));
    });
}

}  // namespace bitwright
