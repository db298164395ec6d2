// A new grid for one group, given the weights of all other groups.
#pragma once

#include <vector>

#include "quant/grid.hpp"

namespace bitwright {

// Tries several grids for one group of 16 rows. With W − Ŵ left as it is in all other groups, the
// objective is a parabola (ŵ − w*) G (ŵ − w*)ᵀ in the group's weights ŵ, G being the group's part
// of the gram and w* the best real weights. To each grid the weights are rounded as GPTQ does, the
// error of each made up for by those still to come, which also tells what the parabola is there.
template <typename Fitted>
struct GroupSearch {
    static constexpr int steps = 6;  // ranges that are tried, from that of w* down
    static constexpr float last_shrink = 0.6f;
    static constexpr float sure = 1.0f - 1e-4f;  // a smaller gain may be float32's rounding

    const Grid& grid;
    std::vector<float> codes;  // of the best grid, [group_size][16]
    Fitted found{};
    Lanes gained;  // by which the objective falls, 0 in rows that stay as they are

    explicit GroupSearch(const Grid& of_groups)
        : grid(of_groups),
          codes(static_cast<size_t>(grid.group_size * lane_count)),
          best_(codes.size()),
          work_(codes.size()),
          tried_(codes.size()) {}

    // upper is U [group_size, group_size] with G⁻¹ = UᵀU; residual and codes_now hold
    // (W − Ŵ) G and the codes as they are, [group_size][16]. Tells whether any row is to change.
    bool run(const Matrix<float>& upper, const float* residual, const float* codes_now,
             const Fitted& now) {
        const Index size = grid.group_size;
        for (Index a = 0; a < size; ++a) {
            Lanes total = Lanes::Zero();
            for (Index b = a; b < size; ++b) total += upper(a, b) * lanes(residual, b);
            lanes(work_, a) = total;
        }
        Lanes low = Lanes::Constant(INFINITY), high = -low, error_now = Lanes::Zero();
        for (Index b = 0; b < size; ++b) {
            Lanes away = Lanes::Zero();
            for (Index a = 0; a <= b; ++a) away += upper(a, b) * lanes(work_, a);
            error_now += away * lanes(residual, b);
            lanes(best_, b) = now.decode(lanes(codes_now, b)) + away;
            low = low.min(lanes(best_, b));
            high = high.max(lanes(best_, b));
        }
        std::copy(codes_now, codes_now + codes.size(), codes.begin());
        found = now;
        Lanes least = error_now * sure;
        const auto try_grid = [&](const Fitted& candidate) { offer(candidate, upper, least); };
        for (int step = 0; step < steps; ++step) {
            const float shrink =
                1.0f - (1.0f - last_shrink) * static_cast<float>(step) / (steps - 1);
            range_lanes<Fitted>(grid, low * shrink, high * shrink, [&](const Fitted& candidate) {
                try_grid(candidate);
                if constexpr (std::is_same_v<Fitted, GridLanes>) try_zeros(candidate, try_grid);
            });
        }
        gained = (least < error_now * sure).select(error_now - least, 0.0f);
        return (gained > 0.0f).any();
    }

    auto codes_at(Index j) const { return lanes(codes.data(), j); }

  private:
    std::vector<float> best_;  // w*
    std::vector<float> work_, tried_;

    static Eigen::Map<Lanes> lanes(std::vector<float>& data, Index j) {
        return Eigen::Map<Lanes>(data.data() + j * lane_count);
    }
    static Eigen::Map<const Lanes> lanes(const float* data, Index j) {
        return Eigen::Map<const Lanes>(data + j * lane_count);
    }

    // An integer zero may be better one further up or down.
    template <typename Try>
    void try_zeros(const Fitted& candidate, const Try& try_grid) const {
        if (grid.kind != GridKind::zero_point) return;
        for (const float away : {-1.0f, 1.0f}) {
            Fitted other = candidate;
            other.zero = (candidate.zero + away).max(0.0f).min(grid.top());
            try_grid(other);
        }
    }

    void offer(const Fitted& candidate, const Matrix<float>& upper, Lanes& least) {
        const Index size = grid.group_size;
        std::copy(best_.begin(), best_.end(), work_.begin());
        Lanes error = Lanes::Zero();
        for (Index j = 0; j < size; ++j) {
            const Lanes code = candidate.encode(lanes(work_, j), grid.top());
            lanes(tried_, j) = code;
            const float* factor = upper.data() + j * size;
            const Lanes part = (lanes(work_, j) - candidate.decode(code)) / factor[j];
            error += part.square();
            for (Index k = j + 1; k < size; ++k) lanes(work_, k) -= part * factor[k];
        }
        Best<Fitted> best{found, least};
        const auto better = best.offer(candidate, error);
        if (!better.any()) return;
        found = best.grid;
        least = best.error;
        for (Index j = 0; j < size; ++j)
            Eigen::Map<Lanes>(codes.data() + j * lane_count) =
                better.select(lanes(tried_, j), lanes(codes, j));
    }
};

}  // namespace bitwright
