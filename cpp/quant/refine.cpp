#include "quant/refine.hpp"

#include <Eigen/Cholesky>
#include <algorithm>
#include <numeric>
#include <vector>

#include "linalg/inverse_factor.hpp"
#include "linalg/ordered_sum.hpp"
#include "linalg/product.hpp"
#include "linalg/sum.hpp"
#include "quant/group_search.hpp"
#include "quant/lazy_updates.hpp"
#include "quant/slab.hpp"

namespace bitwright {
namespace {

constexpr Index block_columns = 128;      // columns between two lazy updates
constexpr Index tile_rows = 1024;         // rows at a time, which are independent of all others
constexpr Index system_bytes = 16 << 20;  // of the normal equations that a thread has at a time
constexpr float ridge = 1e-5f;            // of their diagonal

// The gram's sums over the rows of each group, and over both rows and columns.
struct GroupSums {
    Matrix<float> rows;  // [groups, in]
    Matrix<float> both;  // [groups, groups]

    GroupSums(ConstMatrixView<float> gram, Index size)
        : rows(gram.rows() / size, gram.cols()), both(rows.rows(), rows.rows()) {
        for (Index group = 0; group < rows.rows(); ++group)
            rows.row(group) = column_sums(gram.middleRows(group * size, size));
        for (Index group = 0; group < rows.rows(); ++group)
            for (Index other = 0; other < rows.rows(); ++other)
                both(other, group) = sum(rows.row(other).segment(group * size, size));
    }
};

// The inverse factor of each group's part of the gram, empty where that is not positive definite.
std::vector<Matrix<float>> group_factors(ConstMatrixView<float> gram, Index size) {
    std::vector<Matrix<float>> factors(static_cast<size_t>(gram.rows() / size));
    Vector<std::int32_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    for (size_t group = 0; group < factors.size(); ++group) {
        const Index first = static_cast<Index>(group) * size;
        const Matrix<float> part = gram.block(first, first, size, size);
        Matrix<float>& factor = factors[group];
        factor.resize(size, size);
        MatrixView<float> upper(factor.data(), size, size);
        if (!inverse_factor({part.data(), size, size}, {order.data(), size}, 0.0f, upper))
            factor.resize(0, 0);
    }
    return factors;
}

// Of a tile of rows. Columns are contiguous in `residual`, `change` and `steps`, so that 16 rows of
// one column are one cache line.
template <typename Fitted>
struct Refinement {
    ConstMatrixView<float> weight, gram;
    const GroupSums& sums;
    const std::vector<Matrix<float>>& factors;  // of groups that may get new grids
    const Grid& grid;
    QuantizedView result;
    Eigen::MatrixXf residual;  // (W − Ŵ) G, [rows padded to 16, in]
    Eigen::MatrixXf change;    // of Ŵ in one round; W − Ŵ at the start
    Eigen::MatrixXf steps;     // the part of it that a sweep over the codes has made
    Vector<double> gains;      // by which each row's objective has fallen, [rows]

    Refinement(ConstMatrixView<float> weights, ConstMatrixView<float> moments,
               const GroupSums& group_sums, const std::vector<Matrix<float>>& group_factors,
               const Grid& of_groups, QuantizedView quantized)
        : weight(weights),
          gram(moments),
          sums(group_sums),
          factors(group_factors),
          grid(of_groups),
          result(quantized),
          residual((weights.rows() + lane_count - 1) / lane_count * lane_count, weights.cols()),
          change(residual.rows(), residual.cols()),
          steps(residual.rows(), residual.cols()),
          gains(Vector<double>::Zero(weights.rows())) {}

    Index out() const { return weight.rows(); }
    Index in() const { return weight.cols(); }
    Index groups() const { return result.scales.cols(); }
    bool affine() const { return grid.kind == GridKind::affine; }

    // residual = (W − Ŵ) G
    void start() {
        each_slab([&](Index row, const float* codes, float* slab) {
            load_slab(weight, row, 0, in(), slab);
            for_each_weight(row, codes, result.scales, result.offsets,
                            [&](Index j, const Lanes& value) {
                                change.col(j).segment<lane_count>(row) =
                                    (Eigen::Map<Lanes>(slab + j * lane_count) - value).matrix();
                            });
        });
        set_product(residual, change, gram);
    }

    // change = what new grids have changed, and the residual of each block of columns knows of
    // that in its own and later blocks: sweep() carries the rest along.
    void take_over_grids(Matrix<float>& old_scales, Matrix<float>& old_offsets) {
        const MatrixView<float> scales(old_scales.data(), out(), groups()),
            offsets(old_offsets.data(), out(), groups());
        each_slab([&](Index row, const float* codes, float*) {
            for_each_weight(row, codes, result.scales, result.offsets,
                            [&](Index j, const Lanes& value) {
                                change.col(j).segment<lane_count>(row) = value.matrix();
                            });
            for_each_weight(row, codes, scales, offsets, [&](Index j, const Lanes& value) {
                change.col(j).segment<lane_count>(row).array() -= value;
            });
        });
        lazy_updates(
            0, in(), block_columns,
            [&](Index low, Index high) { push(change, low, high, low, high); }, no_update,
            [&](Index low, Index middle, Index high) { push(change, middle, high, low, middle); });
    }

    // One sweep over the codes, column by column, each of which knows of all steps before it.
    void sweep(bool last) {
        lazy_updates(
            0, in(), block_columns,
            [&](Index low, Index high) {
                sweep_columns(low, high);
                if (!last) push(steps, low, high, low, high);
            },
            [&](Index low, Index middle, Index high) { push(change, low, middle, middle, high); },
            [&](Index low, Index middle, Index high) {
                if (!last) push(steps, middle, high, low, middle);
            });
    }

    // What columns [low, high) of Ŵ have moved by reaches the residual of columns [first, end).
    void push(const Eigen::MatrixXf& moved, Index low, Index high, Index first, Index end) {
        add_product(residual.middleCols(first, end - first), moved.middleCols(low, high - low),
                    gram.block(low, first, high - low, end - first), -1.0f);
    }

    template <typename Body>
    void each_slab(const Body& body) const {
        parallel_for(residual.rows() / lane_count, 1, [&](Index first, Index last) {
            std::vector<float> codes(static_cast<size_t>(in() * lane_count)), other(codes.size());
            for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
                load_slab(ConstMatrixView<std::uint8_t>(result.codes.data(), out(), in()), row, 0,
                          in(), codes.data());
                body(row, codes.data(), other.data());
            }
        });
    }

    // body(j, values of column j of Ŵ in 16 rows)
    template <typename Body>
    void for_each_weight(Index row, const float* codes, const MatrixView<float>& scales,
                         const MatrixView<float>& offsets, const Body& body) const {
        for (Index group = 0; group < groups(); ++group) {
            const auto fitted = load_grid<Fitted>(grid, row, group, scales, offsets);
            for (Index j = group * grid.group_size; j < (group + 1) * grid.group_size; ++j)
                body(j, fitted.decode(Eigen::Map<const Lanes>(codes + j * lane_count)));
        }
    }

    double objective() const {
        return ordered_sum(in(), 16, [&](Index j) {
            return dot(change.col(j).head(out()), residual.col(j).head(out()));
        });
    }

    void sweep_columns(Index low, Index high) {
        parallel_for(residual.rows() / lane_count, 4, [&](Index first, Index last) {
            const auto size = static_cast<size_t>((high - low) * lane_count);
            Leaf leaf{0, low, high - low, std::vector<float>(size), std::vector<float>(size)};
            GroupSearch<Fitted> search(grid);
            for (Index slab = first; slab < last; ++slab) {
                leaf.row = slab * lane_count;
                sweep_leaf(leaf, search);
            }
        });
    }

    // Columns [low, low + count) of 16 rows, [count][16].
    struct Leaf {
        Index row, low, count;
        std::vector<float> residual, codes;

        auto residual_at(Index j) { return Eigen::Map<Lanes>(residual.data() + j * lane_count); }
        auto codes_at(Index j) { return Eigen::Map<Lanes>(codes.data() + j * lane_count); }
    };

    void sweep_leaf(Leaf& leaf, GroupSearch<Fitted>& search) {
        const Index row = leaf.row, low = leaf.low;
        load_slab(ConstMatrixView<std::uint8_t>(result.codes.data(), out(), in()), row, low,
                  leaf.count, leaf.codes.data());
        for (Index j = 0; j < leaf.count; ++j)
            leaf.residual_at(j) = residual.col(low + j).segment<lane_count>(row).array();
        steps.block(row, low, lane_count, leaf.count).setZero();
        Fitted fitted{};
        Lanes gained = Lanes::Zero();
        Index loaded = -1;
        for (Index j = 0; j < leaf.count; ++j) {
            const Index group = (low + j) / grid.group_size;
            if (group != loaded) {
                fitted = load_grid<Fitted>(grid, row, group, result.scales, result.offsets);
                loaded = group;
                if (!factors.empty()) gained += choose_grid(leaf, j, group, fitted, search);
            }
            const float curvature = gram(low + j, low + j);
            if (!(curvature > 0.0f)) continue;
            const Lanes slope = leaf.residual_at(j), now = fitted.decode(leaf.codes_at(j));
            // The objective is a parabola in this weight, its minimum at now + residual / G[j, j].
            const Lanes code = fitted.encode(now + slope / curvature, grid.top());
            const Lanes step = fitted.decode(code) - now;
            // A tie, or a step that rounding turned round, gains nothing.
            const Lanes gain = step * (2.0f * slope - step * curvature);
            const auto better = (gain > 0.0f).eval();
            leaf.codes_at(j) = better.select(code, leaf.codes_at(j));
            if (!better.any()) continue;
            gained += better.select(gain, Lanes::Zero());
            move(leaf, j, better.select(step, Lanes::Zero()), j + 1);
        }
        const Index rows = std::min<Index>(lane_count, out() - row);
        for (Index lane = 0; lane < rows; ++lane) {
            gains[row + lane] += gained[lane];
            for (Index j = 0; j < leaf.count; ++j)
                result.codes(row + lane, low + j) =
                    static_cast<std::uint8_t>(leaf.codes_at(j)[lane]);
        }
    }

    // Column low + j of Ŵ moves, which changes the residual of columns low + first and on.
    void move(Leaf& leaf, Index j, const Lanes& step, Index first) {
        const Index column = leaf.low + j;
        steps.col(column).segment<lane_count>(leaf.row) += step.matrix();
        change.col(column).segment<lane_count>(leaf.row) += step.matrix();
        const float* row_of_gram = gram.data() + column * in() + leaf.low;
        for (Index k = first; k < leaf.count; ++k) leaf.residual_at(k) -= step * row_of_gram[k];
    }

    // A new grid and new codes for the group that begins at column low + j, in the rows where that
    // gains; returns what.
    Lanes choose_grid(Leaf& leaf, Index j, Index group, Fitted& fitted,
                      GroupSearch<Fitted>& search) {
        const auto& factor = factors[static_cast<size_t>(group)];
        const Index at = j * lane_count;
        if (factor.size() == 0 ||
            !search.run(factor, leaf.residual.data() + at, leaf.codes.data() + at, fitted))
            return Lanes::Zero();
        for (Index k = 0; k < grid.group_size; ++k) {
            const Lanes now = fitted.decode(leaf.codes_at(j + k));
            leaf.codes_at(j + k) = search.codes_at(k);
            const Lanes step = search.found.decode(leaf.codes_at(j + k)) - now;
            move(leaf, j + k, (search.gained > 0.0f).select(step, Lanes::Zero()), j);
        }
        fitted = search.found;
        store_grid(grid, fitted, leaf.row, group, result.scales, result.offsets);
        return search.gained;
    }

    // Scales and biases in closed form. With c̄ the middle code (or the zero), ŵ = s (c − c̄) + m.
    void fit_grids() {
        const Index size = grid.group_size, count = groups();
        const Index unknowns = affine() ? 2 * count : count;
        const Index tile = std::clamp<Index>(system_bytes / (4 * unknowns * unknowns), 4, 64);
        parallel_for((out() + tile - 1) / tile, 1, [&](Index begin, Index end) {
            Matrix<float> codes(tile, in()), product(tile, in());
            std::vector<Matrix<float>> systems(static_cast<size_t>(tile),
                                               Matrix<float>(unknowns, unknowns));
            for (Index first = begin * tile; first < std::min(end * tile, out()); first += tile) {
                const Index rows = std::min(tile, out() - first);
                for (Index row = 0; row < rows; ++row) centre(first + row, codes.row(row).data());
                for (Index group = 0; group < count; ++group) {
                    const Index from = group * size, width = in() - from;
                    product.topLeftCorner(rows, width).noalias() =
                        codes.block(0, from, rows, size) * gram.block(from, from, size, width);
                    for (Index row = 0; row < rows; ++row)
                        for (Index other = group; other < count; ++other) {
                            const Index at = other * size;
                            const auto part = product.row(row).segment(at - from, size);
                            const auto code = codes.row(row).segment(at, size);
                            auto& system = systems[static_cast<size_t>(row)];
                            system(other, group) = sum(part.array() * code.array());
                            if (!affine()) continue;
                            system(count + other, group) = sum(part);
                            system(count + group, other) =
                                sum(sums.rows.row(group).segment(at, size).array() * code.array());
                            system(count + other, count + group) = sums.both(other, group);
                        }
                }
                for (Index row = 0; row < rows; ++row)
                    fit_row(first + row, codes.row(row).data(), systems[static_cast<size_t>(row)]);
            }
        });
    }

    float centre_of(Index row, Index group) const {
        return affine() ? 0.5f * grid.top() : result.offsets(row, group);
    }

    void centre(Index row, float* codes) const {
        for (Index j = 0; j < in(); ++j)
            if constexpr (std::is_same_v<Fitted, TableLanes>)
                codes[j] = grid.table.points[result.codes(row, j)];
            else
                codes[j] =
                    static_cast<float>(result.codes(row, j)) - centre_of(row, j / grid.group_size);
    }

    // Where scales are so few that rounding moves them far, each takes its best one given all
    // others.
    Vector<float> stored_steps(Index row, const Matrix<float>& system,
                               const Vector<float>& slopes) const {
        constexpr int sweeps = 3;
        Vector<float> step = Vector<float>::Zero(groups());
        const auto symmetric = system.template selfadjointView<Eigen::Lower>();
        Vector<float> left = slopes;
        for (int sweep = 0; sweep < sweeps; ++sweep)
            for (Index group = 0; group < groups(); ++group) {
                const float curve = system(group, group), scale = result.scales(row, group);
                if (!(curve > 0.0f)) continue;
                const float wanted = scale + step[group] + left[group] / curve;
                const float change = moved_scale(grid, scale, wanted) - scale - step[group];
                if (!(change * (2.0f * left[group] - change * curve) > 0.0f)) continue;
                step[group] += change;
                left -= symmetric * (change * Vector<float>::Unit(groups(), group));
            }
        return step;
    }

    // The system's lower triangle holds the normal equations of one row.
    void fit_row(Index row, const float* codes, const Matrix<float>& system) {
        const Index size = grid.group_size, count = groups(), unknowns = system.rows();
        Vector<float> slopes(unknowns);
        for (Index group = 0; group < count; ++group) {
            float by_code = 0.0f, by_weight = 0.0f;
            for (Index j = group * size; j < (group + 1) * size; ++j) {
                by_code += codes[j] * residual(row, j);
                by_weight += residual(row, j);
            }
            slopes[group] = by_code;
            if (affine()) slopes[count + group] = by_weight;
        }
        Matrix<float> damped = system;
        damped.diagonal() *= 1.0f + ridge;
        damped.diagonal().array() += 1e-12f * system.diagonal().maxCoeff() + 1e-30f;
        const Eigen::LLT<Eigen::Ref<Matrix<float>>, Eigen::Lower> factored(damped);
        if (factored.info() != Eigen::Success) return;
        Vector<float> step = factored.solve(slopes);
        if (!step.allFinite()) return;
        if (has_few_scales(grid.scale_type)) step = stored_steps(row, system, slopes);

        Vector<float> scales(count), offsets(count);
        for (Index group = 0; group < count; ++group) {
            const float scale = result.scales(row, group), offset = result.offsets(row, group);
            const float middle = centre_of(row, group);
            const float moved = moved_scale(grid, scale, scale + step[group]);
            step[group] = moved - scale;
            scales[group] = moved;
            offsets[group] = offset;
            if (!affine()) continue;
            const float mean = offset + scale * middle;
            offsets[group] = round_to(grid.scale_type, mean + step[count + group] - moved * middle);
            step[count + group] = offsets[group] + moved * middle - mean;
        }
        const auto symmetric = system.template selfadjointView<Eigen::Lower>();
        const Vector<float> curvature = symmetric * step;
        const double gain = 2.0 * dot(step, slopes) - dot(step, curvature);
        if (!(gain > 0.0) || !scales.allFinite() || !offsets.allFinite()) return;
        result.scales.row(row) = scales.transpose();
        result.offsets.row(row) = offsets.transpose();
        gains[row] += gain;
    }
};

template <typename Fitted>
void refine_lanes(ConstMatrixView<float> weight, ConstMatrixView<float> gram, const Grid& grid,
                  Index rounds, bool codes_only, QuantizedView result,
                  VectorView<double> objectives) {
    objectives.setZero();
    const GroupSums sums(gram, grid.group_size);
    // A sweep has the residual of whole groups at hand where blocks of columns consist of them.
    const bool chooses = !codes_only && block_columns % grid.group_size == 0;
    const auto factors =
        chooses ? group_factors(gram, grid.group_size) : std::vector<Matrix<float>>{};
    const Index in = weight.cols(), groups = result.scales.cols();
    for (Index first = 0; first < weight.rows(); first += tile_rows) {
        const Index rows = std::min(tile_rows, weight.rows() - first);
        const QuantizedView part{
            {result.codes.data() + first * in, rows, in},
            {result.scales.data() + first * groups, rows, groups},
            {result.offsets.data() + first * groups, rows, groups},
        };
        Refinement<Fitted> state({weight.data() + first * in, rows, in}, gram, sums, factors, grid,
                                 part);
        state.start();
        const double before = state.objective();
        objectives[0] += before;
        for (Index round = 0; round < rounds; ++round) {
            Matrix<float> scales = part.scales, offsets = part.offsets;
            if (!codes_only) state.fit_grids();
            state.take_over_grids(scales, offsets);
            state.sweep(round + 1 == rounds);
            objectives[round + 1] += before - sum(state.gains);
        }
    }
}

}  // namespace

void refine(ConstMatrixView<float> weight, ConstMatrixView<float> gram, const Grid& grid,
            Index rounds, bool codes_only, QuantizedView result, VectorView<double> objectives) {
    with_lanes(grid, [&]<typename Fitted>(Fitted) {
        refine_lanes<Fitted>(weight, gram, grid, rounds, codes_only, result, objectives);
    });
}

}  // namespace bitwright
