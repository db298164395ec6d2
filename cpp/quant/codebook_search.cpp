#include "quant/codebook_search.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "quant/scale_type.hpp"

namespace bitwright {
namespace {

constexpr int chunks = 2;  // of 16 candidates, which are looked at together
constexpr float no_limit = std::numeric_limits<float>::infinity();

// For every number of digits the 32 vectors that are nearest to these magnitudes:
// [number][chunk][weight][candidate].
std::vector<std::int8_t> nearest_vectors(const Codebook& book) {
    const auto width = static_cast<size_t>(book.width), count = static_cast<size_t>(book.size());
    const size_t wanted = size_t{chunks} * lane_count;
    std::vector<std::int8_t> lists(book.codes.size() * wanted * width);
    std::vector<int> distances(count), order(count), centre(width);
    for (size_t number = 0; number < book.codes.size(); ++number) {
        size_t rest = number;
        for (int& magnitude : centre) {
            magnitude = int{book.magnitudes[rest % book.magnitudes.size()]};
            rest /= book.magnitudes.size();
        }
        for (size_t code = 0; code < count; ++code) {
            distances[code] = 0;
            for (size_t i = 0; i < width; ++i) {
                const int change = book.values[code * width + i] - centre[i];
                distances[code] += change * change;
            }
        }
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + static_cast<Index>(wanted), order.end(),
                          [&](int a, int b) {
                              const int one = distances[static_cast<size_t>(a)],
                                        other = distances[static_cast<size_t>(b)];
                              return one != other ? one < other : a < b;
                          });
        for (size_t k = 0; k < wanted; ++k)
            for (size_t i = 0; i < width; ++i)
                lists[((number * chunks + k / lane_count) * width + i) * lane_count +
                      k % lane_count] = book.values[static_cast<size_t>(order[k]) * width + i];
    }
    return lists;
}

// Made once for each codebook, when it is first asked for.
const std::int8_t* neighbour_lists(CodebookName name) {
    constexpr size_t books = 6;
    static std::array<std::once_flag, books> made;
    static std::array<std::vector<std::int8_t>, books> lists;
    const auto index = static_cast<size_t>(name);
    std::call_once(made[index], [&] { lists[index] = nearest_vectors(codebook(name)); });
    return lists[index].data();
}

// (UᵀU)⁻¹ = U⁻¹U⁻ᵀ of [size, size].
void inverse_of_product(const float* upper, Index stride, Index size, float* result) {
    std::array<double, 64> inverse{};
    for (Index column = 0; column < size; ++column)
        for (Index row = column; row >= 0; --row) {
            double value = row == column ? 1.0 : 0.0;
            for (Index k = row + 1; k <= column; ++k)
                value -= static_cast<double>(upper[row * stride + k]) *
                         inverse[static_cast<size_t>(k * size + column)];
            inverse[static_cast<size_t>(row * size + column)] =
                value / static_cast<double>(upper[row * stride + row]);
        }
    for (Index i = 0; i < size; ++i)
        for (Index j = 0; j < size; ++j) {
            double value = 0.0;
            for (Index k = std::max(i, j); k < size; ++k)
                value += inverse[static_cast<size_t>(i * size + k)] *
                         inverse[static_cast<size_t>(j * size + k)];
            result[i * size + j] = static_cast<float>(value);
        }
}

}  // namespace

UnitMetric unit_metric(const float* upper, Index stride, const CodebookType& type) {
    UnitMetric metric;
    const Index width = type.vectors().width;
    for (Index vector = 0; vector < type.vectors_per_unit(); ++vector)
        inverse_of_product(upper + vector * width * (stride + 1), stride, width,
                           metric.cost.data() + vector * width * width);
    for (Index j = 0; j < unit_size; ++j)
        for (Index k = j + 1; k < unit_size; ++k)
            metric.feed[static_cast<size_t>(j * unit_size + k)] =
                upper[j * stride + k] / upper[j * stride + j];
    return metric;
}

UnitMetric diagonal_metric(const float* importance, const CodebookType& type) {
    UnitMetric metric;
    metric.is_diagonal = true;
    const Index width = type.vectors().width;
    for (Index i = 0; i < unit_size; ++i)
        metric.cost[static_cast<size_t>(i / width * width * width + i % width * (width + 1))] =
            importance[i];
    return metric;
}

template <int width>
struct UnitSearch::Found {
    float cost = no_limit;
    std::array<float, width> points{};
    std::array<std::uint8_t, width> codes{};
};

UnitSearch::UnitSearch(const CodebookType& of) : type(of), neighbours_(neighbour_lists(of.book)) {
    const auto magnitudes = type.vectors().magnitudes;
    for (size_t place = 0; place < magnitudes.size(); ++place)
        places_[static_cast<size_t>(magnitudes[place] + 1)] = static_cast<std::uint8_t>(place);
    first_ = static_cast<float>(magnitudes[0]) * type.unit;
    const float last = static_cast<float>(magnitudes[magnitudes.size() - 1]) * type.unit;
    step_ = (last - first_) / static_cast<float>(magnitudes.size() - 1);
}

Index UnitSearch::place_of(float magnitude) const {
    const float top = static_cast<float>(type.vectors().base() - 1);
    return static_cast<Index>(std::clamp(std::rint((magnitude - first_) / step_), 0.0f, top));
}

// Of the vectors near to some magnitudes, with these signs, the one that costs least.
template <int width, bool diagonal>
void UnitSearch::near(const std::array<Index, width>& digits, const std::array<float, width>& signs,
                      const float* weights, const float* cost, int parity,
                      Found<width>& best) const {
    Index number = 0;
    for (int i = width - 1; i >= 0; --i)
        number = number * type.vectors().base() + digits[static_cast<size_t>(i)];
    int negative = 0;
    for (const float sign : signs) negative += sign < 0.0f;
    const bool must_change = parity >= 0 && negative % 2 != parity;
    const bool may_change = parity < 0 && type.vectors().has_signs();
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const std::int8_t* list = neighbours_ + (number * chunks + chunk) * width * lane_count;
        std::array<Lanes, width> points, errors;
        for (size_t i = 0; i < width; ++i) {
            const Eigen::Map<const Eigen::Array<std::int8_t, lane_count, 1>> values(list +
                                                                                    i * lane_count);
            points[i] = values.cast<float>() * (signs[i] * type.unit);
            errors[i] = weights[i] - points[i];
        }
        Lanes total = Lanes::Zero(), change = Lanes::Constant(no_limit), place = Lanes::Zero();
        for (size_t i = 0; i < width; ++i) {
            Lanes slope = cost[i * width + i] * errors[i];
            if constexpr (!diagonal)
                for (size_t j = 0; j < width; ++j)
                    if (j != i) slope += cost[i * width + j] * errors[j];
            total += errors[i] * slope;
            if (!must_change && !may_change) continue;
            // What it costs to have −p in place of p.
            const Lanes other = 4.0f * points[i] * (slope + cost[i * width + i] * points[i]);
            const auto less = (other < change).eval();
            change = less.select(other, change);
            place = less.select(static_cast<float>(i), place);
        }
        if (must_change) total += change;
        if (may_change) total += change.min(0.0f);
        for (int lane = 0; lane < lane_count; ++lane) {
            if (!(total[lane] < best.cost)) continue;
            best.cost = total[lane];
            const bool changes = must_change || (may_change && change[lane] < 0.0f);
            for (size_t i = 0; i < width; ++i) {
                const std::int8_t value = list[i * lane_count + static_cast<size_t>(lane)];
                float sign = signs[i];
                if (changes && place[lane] == static_cast<float>(i)) sign = -sign;
                best.points[i] = sign * type.unit * static_cast<float>(value);
                best.codes[i] = type.is_moved() ? places_[static_cast<size_t>(value + 1)]
                                                : type.code(places_[static_cast<size_t>(value + 1)],
                                                            sign < 0.0f);
            }
        }
    }
}

template <int width, bool diagonal>
void UnitSearch::vector(const float* weights, const float* cost, const float* feed, int parity,
                        Found<width>& best) const {
    std::array<Index, width> plain{}, passed{};
    std::array<float, width> plain_signs{}, passed_signs{}, left{};
    std::copy_n(weights, width, left.begin());
    const auto round = [&](float weight, Index& place, float& sign) {
        sign = type.vectors().has_signs() && weight < 0.0f ? -1.0f : 1.0f;
        place = place_of(sign * weight);
    };
    for (size_t i = 0; i < width; ++i) {
        round(weights[i], plain[i], plain_signs[i]);
        if constexpr (diagonal) continue;
        round(left[i], passed[i], passed_signs[i]);
        const auto magnitude = type.vectors().magnitudes[static_cast<size_t>(passed[i])];
        const float error = left[i] - passed_signs[i] * type.unit * static_cast<float>(magnitude);
        for (size_t k = i + 1; k < width; ++k) left[k] -= error * feed[i * unit_size + k];
    }
    near<width, diagonal>(plain, plain_signs, weights, cost, parity, best);
    if (!diagonal && (passed != plain || passed_signs != plain_signs))
        near<width, diagonal>(passed, passed_signs, weights, cost, parity, best);
}

// Two vectors of four, of which the first has this parity of signs, and so has the second.
template <bool diagonal>
void UnitSearch::two_vectors(const float* weights, const UnitMetric& metric, int parity,
                             UnitChoice& best) const {
    constexpr size_t width = 4;
    std::array<float, unit_size> left{};
    std::copy_n(weights, unit_size, left.begin());
    std::array<Found<width>, 2> found{};
    vector<width, diagonal>(left.data(), metric.cost.data(), metric.feed.data(), parity, found[0]);
    if constexpr (!diagonal)
        for (size_t j = 0; j < width; ++j) {
            const float error = left[j] - found[0].points[j];
            for (size_t k = j + 1; k < unit_size; ++k)
                left[k] -= error * metric.feed[j * unit_size + k];
        }
    vector<width, diagonal>(left.data() + width, metric.cost.data() + width * width,
                            metric.feed.data() + width * (unit_size + 1), parity, found[1]);
    if (!(found[0].cost + found[1].cost < best.cost)) return;
    best.cost = found[0].cost + found[1].cost;
    for (size_t i = 0; i < unit_size; ++i) {
        best.points[i] = found[i / width].points[i % width];
        best.codes[i] = found[i / width].codes[i % width];
    }
}

template <bool diagonal>
UnitChoice UnitSearch::best_unit(const float* weights, const UnitMetric& metric, int down) const {
    UnitChoice best;
    best.cost = no_limit;
    const bool even = type.signs == Signs::even;
    if (type.vectors().width == 4) {
        for (int parity = even ? 0 : -1; parity <= (even ? 1 : -1); ++parity)
            two_vectors<diagonal>(weights, metric, parity, best);
        return best;
    }
    for (int way = 0; way < (type.is_moved() ? 2 : 1); ++way) {
        if (type.is_moved() && down != either_way && way != down) continue;
        const float move = type.is_moved() ? way ? -0.125f : 0.125f : 0.0f;
        std::array<float, unit_size> moved{};
        for (size_t i = 0; i < unit_size; ++i) moved[i] = weights[i] - move;
        Found<unit_size> found;
        found.cost = best.cost;
        vector<unit_size, diagonal>(moved.data(), metric.cost.data(), metric.feed.data(),
                                    even ? 0 : -1, found);
        if (!(found.cost < best.cost)) continue;
        best.cost = found.cost;
        for (size_t i = 0; i < unit_size; ++i) {
            best.points[i] = found.points[i] + move;
            best.codes[i] = type.is_moved() ? type.code(found.codes[i], way != 0) : found.codes[i];
        }
    }
    return best;
}

UnitChoice UnitSearch::run(const float* weights, const UnitMetric& metric, int down) const {
    return metric.is_diagonal ? best_unit<true>(weights, metric, down)
                              : best_unit<false>(weights, metric, down);
}

}  // namespace bitwright
