// Products with quantized weights that stay packed: for the few rows of states that generating text
// has, the time is that of reading the codes.
#pragma once

#include <cstdint>

#include "linalg/matrix.hpp"

namespace bitwright {

// Codes are packed in blocks of 64, each as planes of 8, 4, 2 or 1 bits whose widths add up to the
// bits of a code, the low ones first. Value k of byte j of a plane is that of code j + k · (8 ·
// width): shifts by constants unpack it, whole registers at a time.
constexpr Index packed_block = 64;

inline Index packed_bytes(Index channels, int bits) {
    return (channels + packed_block - 1) / packed_block * (packed_block / 8) * bits;
}

void pack_planes(ConstMatrixView<std::uint8_t> codes, int bits, MatrixView<std::uint8_t> planes);

// Some numbers of a matrix in the type that a file has them in.
struct StoredNumbers {
    enum class Type { float32, float16, bfloat16, int8, uint8 };

    const void* data = nullptr;
    Index columns = 0;
    Type type = Type::float32;

    // In float, [columns]
    void row(Index index, float* target) const;
};

// A weight [planes.rows(), channels]. Of group g, w = scale · code + bias; the scale is scales[g],
// times what its superblock has where there are some, over the divisor. The bias is offsets[g] if
// these are floats; −(dmin of the superblock) · offsets[g] where there is one; −scale · offsets[g]
// otherwise; and −scale · zero where there are no offsets. With points [256], w = scale ·
// points[code].
struct PackedWeight {
    ConstMatrixView<std::uint8_t> planes;
    Index channels;
    int bits;
    StoredNumbers scales, offsets, superscales, supermins;
    const float* points = nullptr;
    float zero = 0, divisor = 1;

    Index groups() const { return scales.columns; }
};

// weight [planes.rows(), channels]
void decode_packed(const PackedWeight& packed, MatrixView<float> weight);

// output [tokens, out] = states [tokens, channels] · weightᵀ + bias, or added to what is there.
void packed_linear(ConstMatrixView<float> states, const PackedWeight& packed, const float* bias,
                   bool adds, MatrixView<float> output);

// The same with a float weight as it is stored, [output.cols(), columns].
void stored_linear(ConstMatrixView<float> states, const StoredNumbers& weight, const float* bias,
                   bool adds, MatrixView<float> output);

}  // namespace bitwright
