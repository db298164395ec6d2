#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "linalg/inverse_factor.hpp"
#include "linalg/ordered_sum.hpp"
#include "linalg/product.hpp"
#include "linalg/sum.hpp"
#include "linalg/threads.hpp"
#include "quant/codebook_search.hpp"
#include "quant/lazy_updates.hpp"
#include "quant/quantize_vectors.hpp"
#include "quant/scale_type.hpp"

namespace bitwright {
namespace {

constexpr Index vector_tile_rows = 1024;  // rows at a time, which are independent of all others
constexpr Index width_of_block = superblock_size;

// The part of the gram that is a unit's: what its vectors cost, and its inverse.
struct UnitGram {
    bool known = false;  // or it is not positive definite
    UnitMetric metric;
    Eigen::Matrix<float, unit_size, unit_size, Eigen::RowMajor> inverse;
};

std::vector<UnitGram> unit_grams(ConstMatrixView<float> gram, const CodebookType& type) {
    std::vector<UnitGram> units(static_cast<size_t>(gram.rows() / unit_size));
    std::array<std::int32_t, unit_size> order;
    std::iota(order.begin(), order.end(), 0);
    for (size_t unit = 0; unit < units.size(); ++unit) {
        const Index first = static_cast<Index>(unit) * unit_size;
        const Matrix<float> part = gram.block(first, first, unit_size, unit_size);
        Matrix<float> factor(unit_size, unit_size);
        MatrixView<float> upper(factor.data(), unit_size, unit_size);
        units[unit].known = inverse_factor({part.data(), unit_size, unit_size},
                                           {order.data(), unit_size}, 0.0f, upper);
        if (!units[unit].known) continue;
        units[unit].metric = unit_metric(factor.data(), unit_size, type);
        units[unit].inverse.noalias() = factor.transpose().lazyProduct(factor);
    }
    return units;
}

// Of a tile of rows. Columns are contiguous in `residual` and `change`.
struct VectorRefinement {
    ConstMatrixView<float> weight, gram;
    const std::vector<UnitGram>& units;
    const UnitSearch& search;
    std::array<float, 16> points;
    MatrixView<std::uint8_t> codes;
    SuperblocksView grids;
    Eigen::MatrixXf residual;  // (W − Ŵ) G, [rows padded to 16, in]
    Eigen::MatrixXf change;    // of Ŵ in one round; W − Ŵ at the start
    Vector<double> gains;      // by which each row's objective has fallen, [rows]

    const CodebookType& type() const { return search.type; }
    Index out() const { return weight.rows(); }
    Index in() const { return weight.cols(); }
    Index groups() const { return width_of_block / type().group_size; }

    float scale(Index row, Index block, Index group) const {
        return static_cast<float>(grids.d(row, block)) *
               static_cast<float>(grids.scale_codes(row, block * groups() + group));
    }

    // Ŵ of a superblock.
    void decode(Index row, Index block, float* values) const {
        for (Index j = 0; j < width_of_block; ++j)
            values[j] = scale(row, block, j / type().group_size) *
                        points[codes(row, block * width_of_block + j)];
    }

    // residual = (W − Ŵ) G
    void start() {
        change.setZero();
        parallel_for(out(), 4, [&](Index first, Index last) {
            std::array<float, width_of_block> values;
            for (Index row = first; row < last; ++row)
                for (Index block = 0; block < in() / width_of_block; ++block) {
                    decode(row, block, values.data());
                    for (Index j = 0; j < width_of_block; ++j)
                        change(row, block * width_of_block + j) =
                            weight(row, block * width_of_block + j) -
                            values[static_cast<size_t>(j)];
                }
        });
        set_product(residual, change, gram);
    }

    double objective() const {
        return ordered_sum(in(), 16, [&](Index j) {
            return dot(change.col(j).head(out()), residual.col(j).head(out()));
        });
    }

    // Each superblock knows of all steps before it.
    void sweep(bool last) {
        change.setZero();
        lazy_updates(
            0, in(), width_of_block,
            [&](Index low, Index high) {
                superblock(low / width_of_block);
                if (!last) push(low, high, low, high);
            },
            [&](Index low, Index middle, Index high) { push(low, middle, middle, high); },
            [&](Index low, Index middle, Index high) {
                if (!last) push(middle, high, low, middle);
            });
    }

    // What columns [low, high) of Ŵ have moved by reaches the residual of columns [first, end).
    void push(Index low, Index high, Index first, Index end) {
        add_product(residual.middleCols(first, end - first), change.middleCols(low, high - low),
                    gram.block(low, first, high - low, end - first), -1.0f);
    }

    // The rows of one superblock that are at hand, [16, 256].
    struct Leaf {
        Matrix<float> residual{lane_count, width_of_block}, values{lane_count, width_of_block},
            moved{lane_count, width_of_block};
        Matrix<float> gram{width_of_block, width_of_block};
    };

    void superblock(Index block) {
        const Index low = block * width_of_block;
        parallel_for(residual.rows() / lane_count, 1, [&](Index first, Index last) {
            Leaf leaf;
            leaf.gram = gram.block(low, low, width_of_block, width_of_block);
            for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
                const Index rows = std::min<Index>(lane_count, out() - row);
                leaf.residual = residual.block(row, low, lane_count, width_of_block);
                leaf.values.setZero();
                for (Index i = 0; i < rows; ++i) decode(row + i, block, leaf.values.row(i).data());
                leaf.moved.noalias() = leaf.values * leaf.gram;
                change.block(row, low, lane_count, width_of_block) = -leaf.values;
                for (Index i = 0; i < rows; ++i) {
                    gains[row + i] += fit_superblock(row + i, block, i, leaf);
                    for (Index group = 0; group < groups(); ++group) {
                        gains[row + i] += fit_group(row + i, block, group, i, leaf);
                        gains[row + i] += choose_vectors(row + i, block, group, i, leaf);
                    }
                    decode(row + i, block, leaf.values.row(i).data());
                }
                change.block(row, low, lane_count, width_of_block) += leaf.values;
            }
        });
    }

    // d, with which all weights move in proportion.
    double fit_superblock(Index row, Index block, Index i, Leaf& leaf) {
        const float d = static_cast<float>(grids.d(row, block));
        if (d == 0.0f) return 0.0;
        const double slope = dot(leaf.residual.row(i), leaf.values.row(i)),
                     curve = dot(leaf.moved.row(i), leaf.values.row(i));
        if (!(curve > 0.0)) return 0.0;
        const Eigen::half found(d * static_cast<float>(1.0 + slope / curve));
        const double share = static_cast<double>(static_cast<float>(found)) / d - 1.0;
        const double gain = share * (2.0 * slope - share * curve);
        if (!(gain > 0.0) || !(static_cast<float>(found) > 0.0f) != !(d > 0.0f) ||
            !std::isfinite(static_cast<float>(found)))
            return 0.0;
        grids.d(row, block) = found;
        leaf.residual.row(i) -= static_cast<float>(share) * leaf.moved.row(i);
        return gain;
    }

    double fit_group(Index row, Index block, Index group, Index i, Leaf& leaf) {
        const Index width = type().group_size, first = group * width;
        const float d = static_cast<float>(grids.d(row, block));
        std::int8_t& code = grids.scale_codes(row, block * groups() + group);
        if (d == 0.0f) return 0.0;
        alignas(64) std::array<float, 32> here{}, turned{};  // where they lie changes no bit
        for (Index j = 0; j < width; ++j)
            here[static_cast<size_t>(j)] = points[codes(row, block * width_of_block + first + j)];
        const Eigen::Map<const Eigen::RowVectorXf> point(here.data(), width);
        Eigen::Map<Eigen::RowVectorXf> curved(turned.data(), width);
        curved.noalias() = point.lazyProduct(leaf.gram.block(first, first, width, width));
        const double slope = dot(leaf.residual.row(i).segment(first, width), point),
                     curve = dot(curved, point);
        if (!(curve > 0.0)) return 0.0;
        const double wanted = code + slope / curve / d;
        const auto found =
            static_cast<std::int8_t>(std::clamp(2.0 * std::rint((wanted - 1.0) / 2.0) + 1.0, 1.0,
                                                static_cast<double>(type().top_scale)));
        const double step = static_cast<double>(found - code) * d;
        const double gain = step * (2.0 * slope - step * curve);
        if (found == code || !(gain > 0.0)) return 0.0;
        code = found;
        leaf.residual.row(i).noalias() -=
            (static_cast<float>(step) * point).lazyProduct(leaf.gram.middleRows(first, width));
        return gain;
    }

    double choose_vectors(Index row, Index block, Index group, Index i, Leaf& leaf) {
        using Unit = Eigen::Matrix<float, 1, unit_size>;
        const float of_group = scale(row, block, group);
        if (of_group == 0.0f) return 0.0;
        double gained = 0.0;
        const Index begin = group * type().group_size;
        for (Index first = begin; first < begin + type().group_size; first += unit_size) {
            const UnitGram& unit =
                units[static_cast<size_t>((block * width_of_block + first) / unit_size)];
            if (!unit.known) continue;
            std::uint8_t* stored = codes.data() + row * in() + block * width_of_block + first;
            const Unit slope = leaf.residual.row(i).segment<unit_size>(first);
            Unit now;
            for (Index j = 0; j < unit_size; ++j) now[j] = points[stored[j]];
            // The objective is a parabola in these weights, its minimum where the slope is zero.
            const Unit wanted = now + slope.lazyProduct(unit.inverse) / of_group;
            const int down = type().signs == Signs::moved_groups ? stored[0] % 2 == 0 : either_way;
            const UnitChoice choice = search.run(wanted.data(), unit.metric, down);
            const Unit step = of_group * (Eigen::Map<const Unit>(choice.points.data()) - now);
            const auto rows = leaf.gram.middleRows<unit_size>(first);
            const Unit curve = step.lazyProduct(rows.template middleCols<unit_size>(first));
            const double gain = 2.0 * dot(step, slope) - dot(step, curve);
            if (!(gain > 0.0)) continue;
            gained += gain;
            std::copy(choice.codes.begin(), choice.codes.end(), stored);
            const Index next = first + unit_size;
            leaf.residual.row(i).tail(width_of_block - next).noalias() -=
                step.lazyProduct(rows.rightCols(width_of_block - next));
        }
        return gained;
    }
};

}  // namespace

void refine_vectors(ConstMatrixView<float> weight, ConstMatrixView<float> gram,
                    const CodebookType& type, Index rounds, MatrixView<std::uint8_t> codes,
                    SuperblocksView grids, VectorView<double> objectives) {
    objectives.setZero();
    const UnitSearch search(type);
    const auto units = unit_grams(gram, type);
    std::array<float, 16> points{};
    for (int code = 0; code < type.points(); ++code)
        points[static_cast<size_t>(code)] = type.point(static_cast<std::uint8_t>(code));
    const Index in = weight.cols(), blocks = grids.d.cols(), groups = grids.scale_codes.cols();
    for (Index first = 0; first < weight.rows(); first += vector_tile_rows) {
        const Index rows = std::min(vector_tile_rows, weight.rows() - first);
        const Index padded = (rows + lane_count - 1) / lane_count * lane_count;
        VectorRefinement state{{weight.data() + first * in, rows, in},
                               gram,
                               units,
                               search,
                               points,
                               {codes.data() + first * in, rows, in},
                               {{grids.d.data() + first * blocks, rows, blocks},
                                {grids.scale_codes.data() + first * groups, rows, groups},
                                {nullptr, 0, 0},
                                {nullptr, 0, 0}},
                               Eigen::MatrixXf(padded, in),
                               Eigen::MatrixXf(padded, in),
                               Vector<double>::Zero(rows)};
        state.start();
        const double before = state.objective();
        objectives[0] += before;
        for (Index round = 0; round < rounds; ++round) {
            state.sweep(round + 1 == rounds);
            objectives[round + 1] += before - sum(state.gains);
        }
    }
}

}  // namespace bitwright
