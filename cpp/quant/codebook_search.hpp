// The vectors of a codebook that are best for eight weights together, without trying all.
#pragma once

#include <array>

#include "quant/codebook_types.hpp"

namespace bitwright {

// What errors of a unit's weights cost, the later ones of them making up for the earlier ones.
struct UnitMetric {
    std::array<float, 64> cost{};  // of each vector's errors, row after row: one matrix, or two
    std::array<float, 64> feed{};  // [j, k]: what an error of weight j takes from weight k
    bool is_diagonal = false;
};

// That of a factor U of an inverse Hessian, of which [8, 8] is given, rows `stride` apart: vectors
// cost e (UᵀU)⁻¹ eᵀ, by the part of U that is theirs.
UnitMetric unit_metric(const float* upper, Index stride, const CodebookType& type);
// That of eight weights which have nothing to do with each other.
UnitMetric diagonal_metric(const float* importance, const CodebookType& type);

struct UnitChoice {
    std::array<std::uint8_t, unit_size> codes{};
    std::array<float, unit_size> points{};
    float cost = 0.0f;
};

constexpr int either_way = -1;

// Candidates are the vectors nearest to the weights rounded one by one, and to the weights rounded
// in turn with every error passed on. Their signs are those of these weights, but for one that is
// changed where that costs less, or makes the number of negative ones even.
class UnitSearch {
  public:
    explicit UnitSearch(const CodebookType& type);

    // For weights in units of their scale; `down` is 0, 1, or either way, of types that are moved.
    UnitChoice run(const float* weights, const UnitMetric& metric, int down = either_way) const;

    const CodebookType& type;

  private:
    const std::int8_t* neighbours_;        // of each number of digits, see codebook_search.cpp
    std::array<std::uint8_t, 64> places_;  // of magnitudes, counted from −1
    float first_, step_;                   // of the magnitudes, nearly

    template <int width>
    struct Found;
    template <int width, bool diagonal>
    void vector(const float* weights, const float* cost, const float* feed, int parity,
                Found<width>& best) const;
    template <int width, bool diagonal>
    void near(const std::array<Index, width>& places, const std::array<float, width>& signs,
              const float* weights, const float* cost, int parity, Found<width>& best) const;
    template <bool diagonal>
    UnitChoice best_unit(const float* weights, const UnitMetric& metric, int down) const;
    template <bool diagonal>
    void two_vectors(const float* weights, const UnitMetric& metric, int parity,
                     UnitChoice& best) const;
    Index place_of(float magnitude) const;
};

}  // namespace bitwright
