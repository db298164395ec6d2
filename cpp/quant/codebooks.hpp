// The codebooks of GGUF's IQ types: which vectors of magnitudes their codes stand for.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "linalg/matrix.hpp"

namespace bitwright {

// Vectors of `width` weights, one after another in the order of their codes. Signs are stored
// beside the codes, but for IQ1_S and IQ1_M, whose weights are −1, 0 and 1.
struct Codebook {
    Index width;
    std::span<const std::int8_t> values;
    std::span<const std::int8_t> magnitudes;  // that its vectors consist of: their digits' values
    std::span<const std::int16_t> codes;  // by the number of the digits, the lowest first, or −1

    const std::int8_t* vector(Index code) const { return values.data() + code * width; }
    Index size() const { return static_cast<Index>(values.size()) / width; }
    Index base() const { return static_cast<Index>(magnitudes.size()); }
    bool has_signs() const { return magnitudes[0] > 0; }
};

enum class CodebookName : std::uint8_t { iq1, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s };
const Codebook& codebook(CodebookName name);

// The points of NVFP4, doubled, by their codes.
inline constexpr std::array<std::int8_t, 16> fp4_points = {0, 1,  2,  3,  4,  6,  8,  12,
                                                           0, -1, -2, -3, -4, -6, -8, -12};

}  // namespace bitwright
