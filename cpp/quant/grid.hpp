// The quantization grid of a group of weights: how a code becomes a weight, how a weight becomes a
// code, and how the grid is fitted. Rows are independent, so everything works on 16 rows at once,
// one per lane: `Lanes` is one weight of each of 16 rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "quant/scale_type.hpp"
#include "quant/table.hpp"

namespace bitwright {

enum class GridKind {
    affine,      // w = s·c + b        b a float (MLX, GGUF Q4_1)
    zero_point,  // w = s·(c − z)      z an integer in 0 .. 2^bits − 1 (GPTQ, AWQ)
    symmetric,   // w = s·(c − z)      z = 2^(bits − 1)
    table,       // w = s·T[c]         T a sorted table (GGUF's IQ4 types, E2M1, E4M3)
};

// All grids but tables are w = s·(c − z) + b: affine has z = 0, the other two b = 0.
struct GridLanes {
    Lanes scale, zero, bias;

    // Always a code, 0 where the grid is not finite: the caller refuses such a grid, but only
    // afterwards.
    Lanes encode(const Lanes& weight, float top) const {
        return (((weight - bias) / scale).rint() + zero)
            .max<Eigen::PropagateNumbers>(0.0f)
            .min(top);
    }
    Lanes decode(const Lanes& code) const { return scale * (code - zero) + bias; }

    // The same for a single row of them.
    float encode(Index lane, float weight, float top) const {
        const float steps = std::rint((weight - bias[lane]) / scale[lane]);
        return std::clamp(steps + zero[lane], 0.0f, top);
    }
    float decode(Index lane, float code) const {
        return scale[lane] * (code - zero[lane]) + bias[lane];
    }
};

// What a method quantizes to.
struct Grid {
    GridKind kind;
    ScaleType scale_type;
    int bits;
    Index group_size;  // consecutive input channels that share a scale
    bool search;       // weighted-MSE search of the range, otherwise plain min-max
    Table table{};     // of GridKind::table

    float top() const { return static_cast<float>((1 << bits) - 1); }
};

// body(of) with a GridLanes or TableLanes, whichever is the grid's: what is hot is compiled for
// each.
template <typename Body>
void with_lanes(const Grid& grid, const Body& body) {
    if (grid.kind == GridKind::table)
        body(TableLanes{});
    else
        body(GridLanes{});
}

// Where a scale moves to: rounded, and never past zero, where its codes would all mean something
// else.
inline float moved_scale(const Grid& grid, float scale, float wanted) {
    const float divisor = grid.table.divisor;
    const float moved = round_to(grid.scale_type, wanted * divisor) / divisor;
    const float sign = scale > 0.0f ? 1.0f : scale < 0.0f ? -1.0f : 0.0f;
    return moved * sign >= smallest_scale(grid.scale_type) / divisor ? moved : scale;
}

constexpr float mlx_floor = 1e-7f;  // MLX's own rounding has no smaller scale

// The scale that just spans [low, high], before it is rounded; 0 where there is no range.
inline Lanes spanning_scale(const Grid& grid, const Lanes& low, const Lanes& high) {
    if (grid.kind == GridKind::affine) return (high - low) / grid.top();
    const Lanes below = low.min(0.0f), above = high.max(0.0f);
    if (grid.kind == GridKind::symmetric) return 2.0f * above.max(-below) / grid.top();
    return (above - below) / grid.top();
}

// The grid that spans [low, high] in every lane. Scales and biases are already rounded to the dtype
// that stores them: codes are chosen on the grid that a reader will see. `floor` is the smallest
// scale of an affine grid.
inline GridLanes span_grid(const Grid& grid, const Lanes& low, const Lanes& high,
                           float floor = mlx_floor) {
    const float top = grid.top();
    const float tiny = smallest_scale(grid.scale_type);
    GridLanes lanes{Lanes::Ones(), Lanes::Zero(), Lanes::Zero()};
    const Lanes spanning = spanning_scale(grid, low, high);
    if (grid.kind == GridKind::affine) {
        // As MLX does: the end of the range with the larger magnitude is on the grid exactly, and
        // so is zero; where that end is negative the scale is positive, otherwise negative.
        const auto negative_end = (low.abs() > high.abs()).eval();
        const Lanes width = spanning.max(floor);
        lanes.scale = negative_end.select(width, -width);
        const Lanes edge = negative_end.select(low, high);
        const Lanes steps = (edge / lanes.scale).rint();
        const auto shifted = (steps != 0.0f).eval();
        lanes.scale = round_to(grid.scale_type, shifted.select(edge / steps, lanes.scale));
        lanes.bias = round_to(grid.scale_type, shifted.select(edge, Lanes::Zero()));
        const Lanes least = negative_end.select(Lanes::Constant(tiny), Lanes::Constant(-tiny));
        lanes.scale = (lanes.scale == 0.0f).select(least, lanes.scale);
        return lanes;
    }
    const Lanes below = low.min(0.0f);
    const auto empty = (high.max(0.0f) - below == 0.0f).eval();
    lanes.scale = round_to(grid.scale_type, empty.select(Lanes::Ones(), spanning)).max(tiny);
    if (grid.kind == GridKind::symmetric)
        lanes.zero.setConstant(static_cast<float>(1 << (grid.bits - 1)));
    else
        lanes.zero = (-below / lanes.scale).rint().min(top);
    return lanes;
}

// Where a scale is so few steps of the smallest one that rounding it moves it by several percent,
// the factor on the range that takes it to the step on its other side; 1 elsewhere.
[[gnu::noinline]] inline Lanes other_rounding(const Grid& grid, const Lanes& low,
                                              const Lanes& high) {
    constexpr float few = 64.0f;
    const float tiny = smallest_scale(grid.scale_type);
    const Lanes exact = spanning_scale(grid, low, high);
    const auto coarse = (exact > 0.0f && exact < few * tiny).eval();
    if (!coarse.any()) return Lanes::Ones();
    const Lanes nearest = round_to(grid.scale_type, exact);
    const Lanes other = (nearest <= exact).select(nearest + tiny, (nearest - tiny).max(tiny));
    return coarse.select(other / coarse.select(exact, 1.0f), 1.0f);
}

// The grids that a search over ranges tries for [low, high]. An affine grid may have its ends
// there, or be moved by up to half a step so that zero is one of its points: that is what groups
// need in which tiny weights meet huge inputs. What span_grid makes of a range is neither; it gives
// up part of the range for both, which costs more than either (figures in docs/experiments.md).
template <typename Try>
void range_grids(const Grid& grid, const Lanes& low, const Lanes& high, Try&& try_grid) {
    if (grid.kind != GridKind::affine) {
        GridLanes spanning = span_grid(grid, low, high);
        try_grid(spanning);
        if (grid.kind == GridKind::zero_point) return;
        // There is one code more below the zero than above it: for the side with the larger
        // weights.
        spanning.scale = -spanning.scale;
        try_grid(spanning);
        return;
    }
    const Lanes width = spanning_scale(grid, low, high);
    const Lanes wanted =
        (width == 0.0f)
            .select(smallest_normal(grid.scale_type), width.max(smallest_scale(grid.scale_type)));
    GridLanes lanes{round_to(grid.scale_type, wanted), Lanes::Zero(), Lanes::Zero()};
    lanes.bias = round_to(grid.scale_type, (low / lanes.scale).rint() * lanes.scale);
    try_grid(lanes);
    lanes.bias = round_to(grid.scale_type, low);
    try_grid(lanes);
}

// The best of the grids that were tried, lane by lane; `grid` to begin with.
template <typename Fitted>
struct Best {
    Fitted grid;
    Lanes error = Lanes::Constant(INFINITY);

    // Returns where the candidate is better than all before it.
    auto offer(const Fitted& candidate, const Lanes& candidate_error) {
        const auto better = (candidate_error < error).eval();
        error = better.select(candidate_error, error);
        grid.scale = better.select(candidate.scale, grid.scale);
        if constexpr (std::is_same_v<Fitted, GridLanes>) {
            grid.zero = better.select(candidate.zero, grid.zero);
            grid.bias = better.select(candidate.bias, grid.bias);
        }
        return better;
    }
};
using BestGrid = Best<GridLanes>;

// What rounding to a grid takes from a weight. As encode() and decode(), with one division for all
// weights of a group instead of one for each: a tie that falls the other way does not change the
// error.
struct GridError {
    const GridLanes& grid;
    float top;
    Lanes inverse_scale = finite_inverse(grid.scale);

    // Of the smallest scales in float32 the inverse is more than float32 holds.
    static Lanes finite_inverse(const Lanes& scale) {
        constexpr float least = 0x1p-127f;
        return (scale.abs() < least).select(least * scale.sign(), scale).inverse();
    }

    Lanes operator()(const Lanes& weight) const {
        const Lanes code =
            (((weight - grid.bias) * inverse_scale).rint() + grid.zero).max(0.0f).min(top);
        return grid.decode(code) - weight;
    }
};

// The grid of plain rounding. An affine one is MLX's own as long as that keeps half of the energy
// of a group; below its floor, or where a scale has few steps, it need not, and then another scale
// takes its place. Of the other two, the better of the roundings up and down is taken where a scale
// has few steps.
template <typename WeightAt>
[[gnu::noinline]] GridLanes plain_grid(const Grid& grid, const Lanes& low, const Lanes& high,
                                       const WeightAt& weight, const float* importance,
                                       Index count) {
    const GridLanes spanning = span_grid(grid, low, high);
    const bool affine = grid.kind == GridKind::affine;
    const Lanes stretch = other_rounding(grid, low, high);
    const Lanes largest = (high > -low).select(high, -low);
    // Of each row by itself, whatever those beside it are.
    auto sure = (stretch == 1.0f).eval();
    if (affine) sure = sure && (largest == 0.0f || spanning_scale(grid, low, high) >= mlx_floor);
    if (sure.all()) return spanning;

    const Lanes unit = (largest > 0.0f).select(largest, 1.0f);  // of which squares are in range
    const auto lost = [&](const GridLanes& candidate) {
        Lanes sum = Lanes::Zero();
        for (Index i = 0; i < count; ++i)
            if (importance[i] != 0.0f)
                sum +=
                    ((candidate.decode(candidate.encode(weight(i), grid.top())) - weight(i)) / unit)
                        .square();
        return sum;
    };
    Lanes energy = Lanes::Zero();
    for (Index i = 0; i < count; ++i)
        if (importance[i] != 0.0f) energy += (weight(i) / unit).square();
    BestGrid found{spanning, lost(spanning)};
    if (affine) sure = sure || found.error <= 0.5f * energy;
    found.error = sure.select(-INFINITY, found.error);
    const GridLanes smaller = span_grid(grid, low, high, 0.0f);
    found.offer(smaller, lost(smaller));
    const GridLanes other = span_grid(grid, low * stretch, high * stretch, 0.0f);
    found.offer(other, lost(other));
    // What takes the end of the range to the grid may have taken both to the same of two multiples.
    const auto same = (stretch != 1.0f && smaller.scale == other.scale).eval();
    if (!affine || !same.any()) return found.grid;
    for (const Lanes& factor : {Lanes(Lanes::Ones()), stretch})
        range_grids(grid, low * factor, high * factor, [&](const GridLanes& candidate) {
            found.offer(candidate, same.select(lost(candidate), INFINITY));
        });
    return found.grid;
}

// Fits the grid to `count` weights of 16 rows, weights[i · lane_count + lane]. The search shrinks
// the range towards zero step by step and keeps, row by row, what has the smallest
//     Σᵢ hᵢ(wᵢ − ŵᵢ)² + penalty · (Σᵢ hᵢ|wᵢ|eᵢ)² / Σᵢ hᵢwᵢ²,      h = importance,
// where eᵢ is by how much |wᵢ − ŵᵢ| exceeds half a step: what clipping took off wᵢ. The first sum
// is the diagonal part of the layer's output error. Rounding errors average out over groups and
// layers, but clipping always takes from the weights, and adds up to a weaker output: so it counts
// for more than its square (figures in docs/experiments.md).
inline GridLanes fit_grid(const Grid& grid, const float* weights, const float* importance,
                          Index count) {
    constexpr int steps = 20;
    constexpr float last_shrink = 0.43f, penalty = 16.0f;
    const auto weight = [&](Index i) { return Eigen::Map<const Lanes>(weights + i * lane_count); };
    Lanes low = Lanes::Constant(INFINITY), high = -low;
    for (Index i = 0; i < count; ++i) {
        if (importance[i] == 0.0f)
            continue;  // an input that is never active has no say in the range
        low = low.min(weight(i));
        high = high.max(weight(i));
    }
    low = (low > high).select(0.0f, low);
    high = (high == -INFINITY).select(0.0f, high);
    if (!grid.search) return plain_grid(grid, low, high, weight, importance, count);

    BestGrid found{span_grid(grid, low, high)};
    Lanes energy = Lanes::Zero();
    for (Index i = 0; i < count; ++i) energy += importance[i] * weight(i).square();
    const auto try_grid = [&](const GridLanes& candidate) {
        const GridError error_of{candidate, grid.top()};
        const Lanes half_step = 0.5f * candidate.scale.abs();
        Lanes error = Lanes::Zero(), clipped = Lanes::Zero();
        for (Index i = 0; i < count; ++i) {
            const Lanes change = error_of(weight(i));
            error += importance[i] * change.square();
            clipped += importance[i] * weight(i).abs() * (change.abs() - half_step).max(0.0f);
        }
        error += penalty * (energy > 0.0f).select(clipped * (clipped / energy), 0.0f);
        found.offer(candidate, error);
    };
    const Lanes stretch = other_rounding(grid, low, high);
    for (int step = (stretch != 1.0f).any() ? -1 : 0; step < steps; ++step) {
        const float shrink = 1.0f - (1.0f - last_shrink) * static_cast<float>(step) / (steps - 1);
        const Lanes factor = step < 0 ? stretch : Lanes::Constant(shrink);
        range_grids(grid, low * factor, high * factor, try_grid);
    }

    const Lanes largest = (high > -low).select(high, -low);
    const auto faint = (largest > 0.0f && largest < 1e-20f).eval();  // float32 has no such squares
    if (faint.any())
        found.offer(plain_grid(grid, low, high, weight, importance, count),
                    faint.select(Lanes::Constant(-INFINITY), Lanes::Constant(INFINITY)));
    return found.grid;
}

// The scale of a table that is stored for one of `sign`: none that is not zero becomes zero.
inline TableLanes table_lanes(const Grid& grid, const Lanes& scale) {
    const Lanes stored = grid.table.stored_scale(grid.scale_type, scale);
    const Lanes least = smallest_scale(grid.scale_type) / grid.table.divisor * scale.sign();
    return {(stored == 0.0f).select(least, stored), &grid.table};
}

// The tables that a search over ranges tries for [low, high]: those whose ends are there, and those
// of which the last but one is, as between the last two points of floats there is the widest gap.
template <typename Try>
void range_tables(const Grid& grid, const Lanes& low, const Lanes& high, Try&& try_grid) {
    const Table& table = grid.table;
    for (const bool negative : {false, true}) {
        if (negative && !table.either_sign) return;
        const Lanes spanning = table.spanning_scale(low, high, negative);
        try_grid(table_lanes(grid, spanning));
        const float gap = table.points[static_cast<size_t>(table.count - 1)] /
                          table.points[static_cast<size_t>(table.count - 2)];
        try_grid(table_lanes(grid, spanning * gap));
    }
}

struct TableError {
    const TableLanes& grid;
    float top;

    Lanes operator()(const Lanes& weight) const {
        return grid.decode(grid.encode(weight, top)) - weight;
    }
};

// As fit_grid. The least error need not be where the ends of the table are those of the range, so
// larger ranges are tried, too, and at last the scale that is best for the codes that were found.
[[gnu::noinline]] inline TableLanes fit_table(const Grid& grid, const float* weights,
                                              const float* importance, Index count) {
    constexpr int steps = 24, refits = 2;
    constexpr float first_stretch = 1.2f, last_shrink = 0.45f;
    const auto weight = [&](Index i) { return Eigen::Map<const Lanes>(weights + i * lane_count); };
    Lanes low = Lanes::Zero(), high = low;
    for (Index i = 0; i < count; ++i) {
        if (importance[i] == 0.0f) continue;
        low = low.min(weight(i));
        high = high.max(weight(i));
    }
    const Table& table = grid.table;
    const Lanes largest = (high > -low).select(high, -low);
    const Lanes unit = (largest > 0.0f).select(largest, 1.0f);  // of which squares are in range
    Lanes spanning = table.spanning_scale(low, high, false);
    if (table.either_sign) {  // the table's larger end for the larger weight
        const Lanes other = table.spanning_scale(low, high, true);
        spanning = (other.abs() < spanning).select(other, spanning);
    }
    Best<TableLanes> found{table_lanes(grid, spanning)};
    if (!grid.search) return found.grid;

    const auto try_grid = [&](const TableLanes& candidate) {
        const TableError error_of{candidate, grid.top()};
        Lanes error = Lanes::Zero();
        for (Index i = 0; i < count; ++i)
            error += importance[i] * (error_of(weight(i)) / unit).square();
        found.offer(candidate, error);
    };
    for (int step = 0; step < steps; ++step) {
        const float factor =
            first_stretch - (first_stretch - last_shrink) * static_cast<float>(step) / (steps - 1);
        range_tables(grid, low * factor, high * factor, try_grid);
    }
    for (int refit = 0; refit < refits; ++refit) {
        Lanes slope = Lanes::Zero(), curve = Lanes::Zero();
        for (Index i = 0; i < count; ++i) {
            const Lanes point = table.decode(found.grid.encode(weight(i), grid.top()));
            slope += importance[i] * point * (weight(i) / unit);
            curve += importance[i] * point.square();
        }
        try_grid(table_lanes(grid, (curve > 0.0f).select(slope / curve * unit, 0.0f)));
    }
    try_grid(TableLanes{Lanes::Zero(), &table});
    return found.grid;
}

// By what a grid is made of, GridLanes or TableLanes.
template <typename Fitted>
Fitted fit_lanes(const Grid& grid, const float* weights, const float* importance, Index count) {
    if constexpr (std::is_same_v<Fitted, TableLanes>)
        return fit_table(grid, weights, importance, count);
    else
        return fit_grid(grid, weights, importance, count);
}

template <typename Fitted, typename Try>
void range_lanes(const Grid& grid, const Lanes& low, const Lanes& high, Try&& try_grid) {
    if constexpr (std::is_same_v<Fitted, TableLanes>)
        range_tables(grid, low, high, try_grid);
    else
        range_grids(grid, low, high, try_grid);
}

// What a search begins with.
template <typename Fitted>
Fitted spanned(const Grid& grid, const Lanes& low, const Lanes& high) {
    if constexpr (std::is_same_v<Fitted, TableLanes>)
        return table_lanes(grid, grid.table.spanning_scale(low, high, false));
    else
        return span_grid(grid, low, high);
}

template <typename Fitted>
using ErrorOf = std::conditional_t<std::is_same_v<Fitted, TableLanes>, TableError, GridError>;

}  // namespace bitwright
