// Weights of GGUF's blocks that no grid here holds: fractions of bits, and points without a zero.
#pragma once

#include <cstdint>
#include <string_view>

#include "linalg/matrix.hpp"

namespace bitwright {

// A type of tensors: its blocks of `bytes` hold so many weights.
struct BlockType {
    std::string_view name;
    Index weights, bytes;
    void (*decode)(const std::uint8_t* block, float* weights);
};

// The type of this name, such as TQ1_0; null where there is none.
const BlockType* block_type(std::string_view name);

// Blocks [out, count · bytes] to weights [out, count · weights].
void decode_blocks(ConstMatrixView<std::uint8_t> blocks, const BlockType& type,
                   MatrixView<float> weights);

}  // namespace bitwright
