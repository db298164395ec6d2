// Codes of 2, 3, 4, 5, 6 or 8 bits in 32-bit words, as one little-endian stream of bits per row:
// code i starts at bit i·bits. MLX packs rows of the weight so; GPTQ the transposed matrix, along
// its input channels.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// codes [rows, n], each below 2^bits, to words [rows, n·bits / 32].
void pack(ConstMatrixView<std::uint8_t> codes, int bits, MatrixView<std::uint32_t> words);

// The reverse.
void unpack(ConstMatrixView<std::uint32_t> words, int bits, MatrixView<std::uint8_t> codes);

// The largest code, 0 for none.
std::uint8_t largest_code(ConstMatrixView<std::uint8_t> codes);

}  // namespace bitwright
