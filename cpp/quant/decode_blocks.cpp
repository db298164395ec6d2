#include "quant/decode_blocks.hpp"

#include <array>
#include <cmath>

#include "quant/stored_blocks.hpp"

namespace bitwright {
namespace {

using Bytes = const std::uint8_t*;

float half(Bytes bytes) { return static_cast<float>(load_number<Eigen::half>(bytes)); }

// A byte holds five digits of base 3, the highest first, as a fraction of 256.
float third(int byte, Index place) {
    constexpr std::array<int, 5> powers = {1, 3, 9, 27, 81};
    return static_cast<float>(((byte * powers[static_cast<size_t>(place)] & 255) * 3 >> 8) - 1);
}
void tq1_0(Bytes block, float* out) {
    const float d = half(block + 52);
    const auto put = [&](Index first, Index width, Index places) {
        for (Index place = 0; place < places; ++place)
            for (Index i = 0; i < width; ++i) *out++ = d * third(block[first + i], place);
    };
    put(0, 32, 5);
    put(32, 16, 5);
    put(48, 4, 4);
}

void tq2_0(Bytes block, float* out) {
    const float d = half(block + 64);
    for (Index i = 0; i < 256; ++i)
        out[i] = d * static_cast<float>((block[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3) - 1);
}

void q1_0(Bytes block, float* out) {
    const float d = half(block);
    for (Index i = 0; i < 128; ++i) out[i] = block[2 + i / 8] >> i % 8 & 1 ? d : -d;
}

void q2_0(Bytes block, float* out) {
    const float d = half(block);
    for (Index i = 0; i < 64; ++i)
        out[i] = d * static_cast<float>((block[2 + i / 4] >> 2 * (i % 4) & 3) - 1);
}

constexpr BlockType types[] = {
    {"TQ1_0", 256, 54, tq1_0},
    {"TQ2_0", 256, 66, tq2_0},
    {"Q1_0", 128, 18, q1_0},
    {"Q2_0", 64, 18, q2_0},
};

}  // namespace

const BlockType* block_type(std::string_view name) {
    for (const BlockType& type : types)
        if (type.name == name) return &type;
    return nullptr;
}

void decode_blocks(ConstMatrixView<std::uint8_t> blocks, const BlockType& type,
                   MatrixView<float> weights) {
    const Index count = blocks.cols() / type.bytes;
    each_block(type.bytes, blocks, [&](Index row, Index block, Bytes bytes) {
        type.decode(bytes, weights.data() + (row * count + block) * type.weights);
    });
}

}  // namespace bitwright
