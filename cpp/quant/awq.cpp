#include "quant/awq.hpp"

#include <limits>
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

// The range of the best grid so far, of each row in an Eigen array.
template <typename Rows>
struct BestRange {
    Rows low, high;

    template <typename Better>
    void keep(const Better& better, const Rows& bottom, const Rows& top) {
        low = better.select(bottom, low);
        high = better.select(top, high);
    }
};

// The search for the range [low, high] to clip to, for many rows at once: first both ends are drawn
// in to each of the shares of max|w|, then each end by itself to every second share, the other one
// staying at its best. try_range(bottom, top) updates `best`. The paper's code draws in both ends
// together only.
template <typename Rows, typename Shares, typename Try, typename Between>
void search_ranges(const Rows& low, const Rows& high, const Shares& shares,
                   const BestRange<Rows>& best, const Try& try_range, const Between& between) {
    const Rows widest = high.max(-low);
    for (Index i = 0; i < shares.size(); ++i)
        try_range(low.max(-shares[i] * widest), high.min(shares[i] * widest));
    between();
    const Rows top = best.high;
    for (Index i = 0; i < shares.size(); i += 2) try_range(shares[i] * low, top);
    const Rows bottom = best.low;
    for (Index i = 0; i < shares.size(); i += 2) try_range(bottom, shares[i] * high);
}

}  // namespace

void scaled_rounding_change(ConstMatrixView<float> weight, ConstVectorView<float> scale,
                            ConstVectorView<float> importance, const Grid& grid,
                            MatrixView<float> change) {
    const Index slabs = (weight.rows() + lane_count - 1) / lane_count, size = grid.group_size;
    // An error of the scaled weight is divided by the scale again.
    const Eigen::VectorXf scaled_importance = importance.array() / scale.array().square();
    with_lanes(grid, [&]<typename Fitted>(Fitted) {
        parallel_for(slabs, 1, [&](Index first, Index last) {
            std::vector<float> slab(static_cast<size_t>(size * lane_count));
            for (Index row = first * lane_count; row < last * lane_count; row += lane_count) {
                for (Index start = 0; start < weight.cols(); start += size) {
                    load_slab(weight, row, start, size, slab.data());
                    for (Index i = 0; i < size; ++i) lanes(slab, i) *= scale[start + i];
                    const auto fitted = fit_lanes<Fitted>(grid, slab.data(),
                                                          scaled_importance.data() + start, size);
                    for (Index i = 0; i < size; ++i) {
                        const Lanes scaled = lanes(slab, i);
                        const Lanes rounded = fitted.decode(fitted.encode(scaled, grid.top()));
                        store_column(Lanes((rounded - scaled) / scale[start + i]), row, start + i,
                                     change);
                    }
                }
            }
        });
    });
}

void quantize_clipped(ConstMatrixView<float> weight, ConstMatrixView<float> gram, const Grid& grid,
                      int steps, float least, QuantizedView result) {
    const Index size = grid.group_size;
    Eigen::VectorXf shares(steps);
    for (int step = 0; step < steps; ++step)
        shares[step] = 1.0f - (1.0f - least) * static_cast<float>(step) / static_cast<float>(steps);
    with_lanes(grid, [&]<typename Fitted>(Fitted) {
        fit_groups(weight, grid, result, [&](const float* slab, Index, Index group) {
            std::vector<float> error(static_cast<size_t>(size * lane_count));
            const auto value = [&](Index i) {
                return Eigen::Map<const Lanes>(slab + i * lane_count);
            };
            Lanes low = value(0), high = low;
            for (Index i = 1; i < size; ++i) {
                low = low.min(value(i));
                high = high.max(value(i));
            }
            Best<Fitted> best{spanned<Fitted>(grid, low, high)};
            BestRange<Lanes> range{low, high};
            const auto try_range = [&](const Lanes& bottom, const Lanes& top) {
                range_lanes<Fitted>(grid, bottom, top, [&](const Fitted& candidate) {
                    const ErrorOf<Fitted> error_of{candidate, grid.top()};
                    for (Index i = 0; i < size; ++i) lanes(error, i) = error_of(value(i));
                    range.keep(
                        best.offer(candidate, block_form(gram, group * size, size, error.data())),
                        bottom, top);
                });
            };
            // Small scales are rounded by several percent: the other way, too.
            const auto round_otherwise = [&] {
                if constexpr (std::is_same_v<Fitted, TableLanes>) return;
                const Lanes stretch = other_rounding(grid, low, high);
                if ((stretch != 1.0f).any()) try_range(low * stretch, high * stretch);
            };
            search_ranges(low, high, shares, range, try_range, round_otherwise);
            return best.grid;
        });
    });
}

void quantize_clipped_by(ConstMatrixView<float> weight, const Grid& grid,
                         ConstVectorView<float> shares, const RowErrors& errors,
                         QuantizedView candidate, QuantizedView result) {
    constexpr int most_grids = 4;  // that range_lanes tries
    const Index rows = weight.rows();
    const ConstMatrixView<float> scales(candidate.scales.data(), rows, 1),
        offsets(candidate.offsets.data(), rows, 1);
    const Eigen::ArrayXf low = weight.rowwise().minCoeff(), high = weight.rowwise().maxCoeff();
    BestRange<Eigen::ArrayXf> range{low, high};
    Eigen::ArrayXd least = Eigen::ArrayXd::Constant(rows, std::numeric_limits<double>::infinity());
    Vector<double> found(rows);
    result.codes.setZero();
    result.scales.setOnes();
    result.offsets.setOnes();

    // candidate = the grids of that number over the ranges, unless there are fewer
    const auto spans = [&](const Eigen::ArrayXf& bottom, const Eigen::ArrayXf& top, int number) {
        bool exists = false;
        for (Index row = 0; row < rows; row += lane_count) {
            const Index live = std::min<Index>(lane_count, rows - row);
            Lanes lows = Lanes::Zero(), highs = Lanes::Zero();
            lows.head(live) = bottom.segment(row, live);
            highs.head(live) = top.segment(row, live);
            int count = 0;
            with_lanes(grid, [&]<typename Fitted>(Fitted) {
                range_lanes<Fitted>(grid, lows, highs, [&](const Fitted& spanning) {
                    if (count++ != number) return;
                    exists = true;
                    store_grid(grid, spanning, row, 0, candidate.scales, candidate.offsets);
                });
            });
        }
        return exists;
    };
    const auto try_range = [&](const Eigen::ArrayXf& bottom, const Eigen::ArrayXf& top) {
        for (int number = 0; number < most_grids && spans(bottom, top, number); ++number) {
            encode(weight, scales, offsets, grid, candidate.codes);
            errors({found.data(), rows});
            const auto better = (found.array() < least).eval();
            range.keep(better, bottom, top);
            for (Index row = 0; row < rows; ++row) {
                if (!better[row]) continue;
                least[row] = found[row];
                result.codes.row(row) = candidate.codes.row(row);
                result.scales.row(row) = candidate.scales.row(row);
                result.offsets.row(row) = candidate.offsets.row(row);
            }
        }
    };
    search_ranges(low, high, shares, range, try_range, [] {});
}

}  // namespace bitwright
