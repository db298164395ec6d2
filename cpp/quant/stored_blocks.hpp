// GGUF's packed rows as bytes: their blocks one after the other, and the numbers in a block.
#pragma once

#include <cstring>

#include "linalg/threads.hpp"

namespace bitwright {

// body(row, block, bytes of the block), for blocks of so many bytes in rows of whole ones.
template <typename Rows, typename Body>
void each_block(Index block_bytes, Rows& blocks, const Body& body) {
    constexpr Index grain = 16;  // rows
    parallel_for(blocks.rows(), grain, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row)
            for (Index block = 0; block < blocks.cols() / block_bytes; ++block)
                body(row, block, blocks.data() + row * blocks.cols() + block * block_bytes);
    });
}

// Fields of ggml's structs are little-endian, and need not be aligned.
template <typename Number>
Number load_number(const std::uint8_t* bytes, Index index = 0) {
    Number value;
    std::memcpy(&value, bytes + index * static_cast<Index>(sizeof value), sizeof value);
    return value;
}
template <typename Number>
void store_number(Number value, std::uint8_t* bytes, Index index = 0) {
    std::memcpy(bytes + index * static_cast<Index>(sizeof value), &value, sizeof value);
}

}  // namespace bitwright
