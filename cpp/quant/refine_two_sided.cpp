#include "quant/refine_two_sided.hpp"

#include <Eigen/Cholesky>
#include <algorithm>
#include <numeric>
#include <vector>

#include "linalg/sum.hpp"
#include "linalg/threads.hpp"
#include "quant/slab.hpp"

namespace bitwright {
namespace {

constexpr Index plane_sweeps = 3;    // that try nearest planes, which take most of the time
constexpr Index lazy_columns = 32;   // whose changes reach each other one by one
constexpr Index dense_share = 8;     // of the weights that change, all are pushed in one product
constexpr double grid_ridge = 1e-5;  // of the diagonal of a grid's normal equations

using Columns = Eigen::MatrixXf;  // whose columns are contiguous

Index padded(Index rows) { return (rows + lane_count - 1) / lane_count * lane_count; }

// One diagonal block of O with its rows, which are independent of all others.
template <typename Fitted>
struct OutputBlock {
    ConstMatrixView<float> gram;
    const Grid& grid;
    QuantizedView result;
    Index rows, in, size;
    Columns metric;          // O, padded with zeros to whole lanes
    Vector<float> diagonal;  // of it
    Matrix<float> residual;  // Δ G
    double gained = 0.0;
    std::vector<Index> order;  // of rows in nearest planes: those that weigh most come first
    Columns feedback;          // what a row's error, in that order, takes from each later one

    // Of one group of columns:
    Columns slopes;  // O Δ G
    Columns codes, change;
    Columns pushed;  // O times the changes of the lazy columns
    std::vector<Fitted> grids;
    Vector<float> wanted, target, code, step, reached;  // of one column

    OutputBlock(ConstMatrixView<float> weight, ConstMatrixView<float> moments,
                ConstMatrixView<float> outputs, const Grid& of_groups, QuantizedView quantized)
        : gram(moments),
          grid(of_groups),
          result(quantized),
          rows(weight.rows()),
          in(weight.cols()),
          size(of_groups.group_size),
          metric(Columns::Zero(padded(rows), padded(rows))),
          residual(rows, in),
          slopes(padded(rows), size),
          codes(padded(rows), size),
          change(padded(rows), size),
          pushed(padded(rows), lazy_columns),
          wanted(rows),
          target(rows),
          code(rows),
          step(rows),
          reached(padded(rows)) {
        metric.topLeftCorner(rows, rows) = outputs.leftCols(rows);
        diagonal = metric.diagonal();
        order_rows();
        grids.resize(static_cast<size_t>(padded(rows) / lane_count));
        Matrix<float> difference(rows, in);
        for (Index group = 0; group < in / size; ++group) {
            load(group);
            for (Index j = 0; j < size; ++j)
                for (Index row = 0; row < rows; ++row)
                    difference(row, group * size + j) =
                        weight(row, group * size + j) - decoded(row, codes(row, j));
        }
        residual.noalias() = difference * gram;
        gained = -objective(difference);
    }

    // With O⁻¹ = UᵀU in the order of the rows, an error e takes e U[row, later] / U[row, row] from
    // the later ones, as in GPTQ.
    void order_rows() {
        order.resize(static_cast<size_t>(rows));
        std::iota(order.begin(), order.end(), Index{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](Index a, Index b) { return diagonal[a] > diagonal[b]; });
        Eigen::MatrixXd permuted(rows, rows);
        for (Index a = 0; a < rows; ++a)
            for (Index b = 0; b < rows; ++b)
                permuted(a, b) =
                    metric(order[static_cast<size_t>(a)], order[static_cast<size_t>(b)]);
        const Eigen::LLT<Eigen::MatrixXd> factored(permuted);
        const Eigen::LLT<Eigen::MatrixXd> inverse(
            factored.solve(Eigen::MatrixXd::Identity(rows, rows)));
        if (factored.info() != Eigen::Success || inverse.info() != Eigen::Success) return;
        const Eigen::MatrixXd lower = inverse.matrixL();
        feedback = (lower * lower.diagonal().cwiseInverse().asDiagonal()).cast<float>();
    }

    bool affine() const { return grid.kind == GridKind::affine; }

    double objective(const Matrix<float>& difference) const {
        const Matrix<float> weighed = metric.topLeftCorner(rows, rows) * difference;
        double total = 0.0;
        for (Index row = 0; row < rows; ++row) total += dot(weighed.row(row), residual.row(row));
        return total;
    }

    float decoded(Index row, float point) const {
        return grids[static_cast<size_t>(row / lane_count)].decode(row % lane_count, point);
    }

    float encoded(Index row, float value) const {
        return grids[static_cast<size_t>(row / lane_count)].encode(row % lane_count, value,
                                                                   grid.top());
    }

    void load(Index group) {
        for (Index row = 0; row < rows; row += lane_count)
            grids[static_cast<size_t>(row / lane_count)] =
                load_grid<Fitted>(grid, row, group, result.scales, result.offsets);
        codes.setZero();
        for (Index row = 0; row < rows; ++row)
            for (Index j = 0; j < size; ++j)
                codes(row, j) = static_cast<float>(result.codes(row, group * size + j));
    }

    void sweep(bool fits, bool planes) {
        for (Index group = 0; group < in / size; ++group) {
            const Index first = group * size;
            load(group);
            slopes.topRows(rows).noalias() =
                metric.topLeftCorner(rows, rows) * residual.middleCols(first, size);
            slopes.bottomRows(slopes.rows() - rows).setZero();
            change.setZero();
            if (fits)
                for (Index row = 0; row < rows; ++row) fit_row(row, group);
            for (Index low = 0; low < size; low += lazy_columns)
                sweep_codes(first, low, std::min(low + lazy_columns, size), planes);
            for (Index row = 0; row < rows; ++row)
                for (Index j = 0; j < size; ++j)
                    result.codes(row, first + j) = static_cast<std::uint8_t>(codes(row, j));
            push(first);
        }
    }

    // What has changed in a group reaches the residual of all columns.
    void push(Index first) {
        const auto changed = change.topRows(rows);
        const Index moved = (changed.array() != 0.0f).count();
        if (moved == 0) return;
        if (moved * dense_share > rows * size) {
            residual.noalias() -= changed * gram.middleRows(first, size);
            return;
        }
        for (Index row = 0; row < rows; ++row)
            for (Index j = 0; j < size; ++j)
                if (change(row, j) != 0.0f)
                    residual.row(row) -= change(row, j) * gram.row(first + j);
    }

    // The codes of columns [low, high) of a group that begins at column `first`.
    void sweep_codes(Index first, Index low, Index high, bool planes) {
        const auto inner = gram.block(first, first, size, size);
        bool any = false;
        for (Index j = low; j < high; ++j) {
            const float curvature = inner(j, j);
            auto moved = pushed.col(j - low);
            moved.setZero();
            if (!(curvature > 0.0f)) continue;
            auto slope = slopes.col(j);
            for (Index other = low; other < j; ++other)
                slope -= inner(other, j) * pushed.col(other - low);
            if (planes && feedback.size() > 0) any |= round_column(first, j, curvature, moved);
            for (Index row = 0; row < rows; row += lane_count)
                any |= sweep_lanes(row, j, curvature, moved);
        }
        if (any && high < size)
            slopes.rightCols(size - high).noalias() -=
                pushed.leftCols(high - low) * inner.block(low, high, high - low, size - high);
    }

    // The codes of one column by nearest planes (Babai 1986) in the metric O, which is what GPTQ
    // does along the other axis: from its best real value, row by row, and each row's rounding
    // error is made up for by the rows still to come. Kept where that gains.
    template <typename Moved>
    bool round_column(Index first, Index j, float curvature, Moved& moved) {
        wanted = residual.col(first + j);
        wanted.noalias() -= change.topRows(rows) * gram.block(first, first + j, size, 1);
        for (Index place = 0; place < rows; ++place) {
            const Index row = order[static_cast<size_t>(place)];
            target[place] = decoded(row, codes(row, j)) + wanted[row] / curvature;
        }
        reached.setZero();
        for (Index place = 0; place < rows; ++place) {
            const Index row = order[static_cast<size_t>(place)];
            code[row] = encoded(row, target[place]);
            const float value = decoded(row, code[row]);
            const Index left = rows - place - 1;
            step[row] = value - decoded(row, codes(row, j));
            if (step[row] != 0.0f) reached += step[row] * metric.col(row);
            target.tail(left) -= (target[place] - value) * feedback.col(place).tail(left);
        }
        const double gain =
            2.0 * dot(step, slopes.col(j).head(rows)) - curvature * dot(step, reached.head(rows));
        if (!(gain > 0.0)) return false;
        gained += gain;
        codes.col(j).head(rows) = code;
        change.col(j).head(rows) += step;
        moved += reached;
        slopes.col(j) -= curvature * reached;
        return true;
    }

    // The codes of 16 rows in one column, one after another where several are better changed.
    template <typename Moved>
    bool sweep_lanes(Index row, Index j, float curvature, Moved& moved) {
        const Fitted& fitted = grids[static_cast<size_t>(row / lane_count)];
        const Lanes steepness = curvature * diagonal_lanes(row);
        const Lanes inverse = (steepness > 0.0f).select(steepness.inverse(), 0.0f);
        bool any = false;
        for (Index start = 0; start < lane_count;) {
            const Lanes slope = slopes.col(j).template segment<lane_count>(row).array();
            const Lanes code_now = codes.col(j).template segment<lane_count>(row).array();
            const Lanes now = fitted.decode(code_now);
            const Lanes code = fitted.encode(now + slope * inverse, grid.top());
            const Lanes step = fitted.decode(code) - now;
            const Lanes gain = step * (2.0f * slope - step * steepness);
            Index lane = start;
            while (lane < lane_count && !(gain[lane] > 0.0f)) ++lane;
            if (lane == lane_count) break;
            any = true;
            gained += gain[lane];
            codes(row + lane, j) = code[lane];
            change(row + lane, j) += step[lane];
            const auto reached = metric.col(row + lane);
            moved += step[lane] * reached;
            slopes.col(j) -= (step[lane] * curvature) * reached;
            start = lane + 1;
        }
        return any;
    }

    Lanes diagonal_lanes(Index row) const {
        Lanes found = Lanes::Zero();
        for (Index lane = 0; lane < std::min<Index>(lane_count, rows - row); ++lane)
            found[lane] = diagonal[row + lane];
        return found;
    }

    // What a change of one group's grid gains: with the codes c as they are, ŵ = s c + m moves by
    // x c + y, and the objective falls by 2 (x a + y b) − (x² p + 2 x y q + y² r).
    struct Parabola {
        double a, b, p, q, r;

        double gain(double x, double y) const {
            return 2.0 * (x * a + y * b) - (x * x * p + 2.0 * x * y * q + y * y * r);
        }
    };

    void fit_row(Index row, Index group) {
        const Index first = group * size;
        const auto inner = gram.block(first, first, size, size);
        Eigen::RowVectorXf code = codes.row(row);
        if constexpr (std::is_same_v<Fitted, TableLanes>)
            for (Index j = 0; j < size; ++j) code[j] = grid.table.decode(code[j]);
        const Eigen::RowVectorXf slope = slopes.row(row);
        const Eigen::RowVectorXf weighed = code * inner;
        const auto weight = static_cast<double>(diagonal[row]);
        const Eigen::RowVectorXf ones = Eigen::RowVectorXf::Ones(size);
        const Eigen::RowVectorXf sums = ones * inner;
        const Parabola parabola{dot(code, slope), dot(ones, slope), weight * dot(weighed, code),
                                weight * dot(weighed, ones), weight * dot(sums, ones)};
        const float scale = result.scales(row, group), offset = result.offsets(row, group);
        const double mean = affine() ? offset : -scale * offset;
        const Candidate best =
            affine() ? best_affine(parabola, scale, offset) : best_zero(parabola, scale, offset);
        if (!(best.gain > 0.0)) return;
        const double x = static_cast<double>(best.scale) - scale;
        const double y = (affine() ? static_cast<double>(best.offset)
                                   : -static_cast<double>(best.scale) * best.offset) -
                         mean;
        gained += best.gain;
        result.scales(row, group) = best.scale;
        result.offsets(row, group) = best.offset;
        grids[static_cast<size_t>(row / lane_count)] = load_grid<Fitted>(
            grid, row / lane_count * lane_count, group, result.scales, result.offsets);
        const Eigen::RowVectorXf step =
            (static_cast<float>(x) * code.array() + static_cast<float>(y)).matrix();
        change.row(row) += step;
        const Eigen::RowVectorXf reached =
            static_cast<float>(x) * weighed + static_cast<float>(y) * sums;
        slopes.noalias() -= metric.col(row) * reached;
    }

    struct Candidate {
        float scale, offset;
        double gain;
    };

    float moved(float scale, double change) const {
        return moved_scale(grid, scale, static_cast<float>(scale + change));
    }

    Candidate best_affine(const Parabola& of, float scale, float offset) const {
        const double p = of.p * (1.0 + grid_ridge), r = of.r * (1.0 + grid_ridge);
        const double determinant = p * r - of.q * of.q;
        if (!(determinant > 0.0)) return {scale, offset, 0.0};
        const double x = (of.a * r - of.b * of.q) / determinant;
        const float stored = moved(scale, x);
        const double taken = static_cast<double>(stored) - scale;
        const double y =
            r > 0.0 ? (of.b - taken * of.q) / r : 0.0;  // given the scale that is stored
        const float shifted = round_to(grid.scale_type, static_cast<float>(offset + y));
        return {stored, shifted, of.gain(taken, static_cast<double>(shifted) - offset)};
    }

    Candidate best_zero(const Parabola& of, float scale, float zero) const {
        Candidate best{scale, zero, 0.0};
        const double mean = -static_cast<double>(scale) * zero;
        const bool fixed = grid.kind != GridKind::zero_point;
        const int top = static_cast<int>(fixed ? zero : grid.top());
        for (int other = fixed ? top : 0; other <= top; ++other) {
            // y = −(s + x) z − m, so that x alone is free.
            const double z = other, at = -scale * z - mean;
            const double curve = of.p - 2.0 * z * of.q + z * z * of.r;
            const double slope = of.a - z * of.b - at * (of.q - z * of.r);
            if (!(curve > 0.0)) continue;
            const float stored = moved(scale, slope / (curve * (1.0 + grid_ridge)));
            const double x = static_cast<double>(stored) - scale;
            const double gain = of.gain(x, at - x * z);
            if (gain > best.gain) best = {stored, static_cast<float>(other), gain};
        }
        return best;
    }
};

}  // namespace

void refine_two_sided(ConstMatrixView<float> weight, ConstMatrixView<float> gram,
                      ConstMatrixView<float> outputs, const Grid& grid, Index sweeps, Index fits,
                      QuantizedView result, VectorView<double> objectives) {
    const Index width = outputs.cols(), in = weight.cols(), groups = result.scales.cols();
    const Index blocks = (weight.rows() + width - 1) / width;
    Matrix<double> found(blocks, sweeps + 1);
    with_lanes(grid, [&]<typename Fitted>(Fitted) {
        parallel_for(blocks, 1, [&](Index begin, Index end) {
            for (Index index = begin; index < end; ++index) {
                const Index first = index * width, rows = std::min(width, weight.rows() - first);
                OutputBlock<Fitted> block({weight.data() + first * in, rows, in}, gram,
                                          {outputs.data() + first * width, rows, width}, grid,
                                          {{result.codes.data() + first * in, rows, in},
                                           {result.scales.data() + first * groups, rows, groups},
                                           {result.offsets.data() + first * groups, rows, groups}});
                found(index, 0) = -block.gained;
                for (Index sweep = 0; sweep < sweeps; ++sweep) {
                    block.sweep(sweep < fits, sweep < plane_sweeps);
                    found(index, sweep + 1) = -block.gained;
                }
            }
        });
    });
    objectives.setZero();
    for (Index index = 0; index < blocks; ++index) objectives += found.row(index).transpose();
}

}  // namespace bitwright
