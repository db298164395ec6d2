#include "quant/decode_blocks.hpp"

#include <bit>
#include <cmath>
#include <cstring>

#include "linalg/threads.hpp"
#include "quant/codebooks.hpp"

namespace bitwright {
namespace {

constexpr Index decoded_rows = 16;
using Bytes = const std::uint8_t*;

// Fields of ggml's structs are little-endian, and need not be aligned.
template <typename Number>
Number number(Bytes bytes, Index index = 0) {
    Number value;
    std::memcpy(&value, bytes + index * static_cast<Index>(sizeof value), sizeof value);
    return value;
}
float half(Bytes bytes) { return static_cast<float>(number<Eigen::half>(bytes)); }
int nibble(Bytes bytes, Index index) { return bytes[index / 2] >> 4 * (index % 2) & 15; }

// Seven signs are stored; the eighth makes their number even.
unsigned even_signs(unsigned seven) {
    return seven | static_cast<unsigned>(std::popcount(seven) & 1) << 7;
}

// Bit i of the signs is set if weight i is negative.
void put_vector(const Codebook& book, Index code, unsigned signs, float scale, float* out) {
    const std::int8_t* vector = book.vector(code);
    for (Index i = 0; i < book.width; ++i)
        out[i] = scale * static_cast<float>(signs >> i & 1 ? -vector[i] : vector[i]);
}

// d, then for every 32 weights four codes and a word: four times seven signs, and a scale.
void iq2_xxs(Bytes block, float* out) {
    const float d = half(block);
    for (Index group = 0; group < 8; ++group, out += 32) {
        const Bytes codes = block + 2 + 8 * group;
        const auto word = number<std::uint32_t>(codes + 4);
        const float scale = d * (0.5f + static_cast<float>(word >> 28)) * 0.25f;
        for (Index i = 0; i < 4; ++i)
            put_vector(codebook(CodebookName::iq2_xxs), codes[i], even_signs(word >> 7 * i & 127),
                       scale, out + 8 * i);
    }
}

// d, 32 codes of nine bits with seven signs, and 16 scales.
void iq2_xs(Bytes block, float* out) {
    const float d = half(block);
    for (Index i = 0; i < 32; ++i) {
        const auto word = number<std::uint16_t>(block + 2, i);
        const float scale = d * (0.5f + static_cast<float>(nibble(block + 66, i / 2))) * 0.25f;
        put_vector(codebook(CodebookName::iq2_xs), word & 511, even_signs(word >> 9), scale,
                   out + 8 * i);
    }
}

// d, the lower bits of 32 codes, their signs, the upper two bits, and 16 scales.
void iq2_s(Bytes block, float* out) {
    const float d = half(block);
    for (Index i = 0; i < 32; ++i) {
        const int code = block[2 + i] | (block[66 + i / 4] >> 2 * (i % 4) & 3) << 8;
        const float scale = d * (0.5f + static_cast<float>(nibble(block + 74, i / 2))) * 0.25f;
        put_vector(codebook(CodebookName::iq2_s), code, block[34 + i], scale, out + 8 * i);
    }
}

// d, 64 codes, and for every 32 weights a word as in IQ2_XXS.
void iq3_xxs(Bytes block, float* out) {
    const float d = half(block);
    for (Index i = 0; i < 64; ++i) {
        const auto word = number<std::uint32_t>(block + 66, i / 8);
        const float scale = d * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
        const unsigned signs = even_signs(word >> 7 * (i / 2 % 4) & 127);
        put_vector(codebook(CodebookName::iq3_xxs), block[2 + i], signs >> 4 * (i % 2), scale,
                   out + 4 * i);
    }
}

// d, the lower bits of 64 codes, the upper bit, the signs, and 8 scales.
void iq3_s(Bytes block, float* out) {
    const float d = half(block);
    for (Index i = 0; i < 64; ++i) {
        const int code = block[2 + i] | (block[66 + i / 8] >> i % 8 & 1) << 8;
        const float scale = d * static_cast<float>(1 + 2 * nibble(block + 106, i / 8));
        put_vector(codebook(CodebookName::iq3_s), code, block[74 + i / 2] >> 4 * (i % 2), scale,
                   out + 4 * i);
    }
}

// Weights −1, 0 and 1, all moved by an eighth.
void put_moved(Index code, bool down, float scale, float* out) {
    const std::int8_t* vector = codebook(CodebookName::iq1).vector(code);
    for (Index i = 0; i < 8; ++i)
        out[i] = scale * (static_cast<float>(vector[i]) + (down ? -0.125f : 0.125f));
}

// d, the lower bits of 32 codes, and for every 32 weights a word: four times three upper bits, a
// scale, and the direction.
void iq1_s(Bytes block, float* out) {
    const float d = half(block);
    for (Index i = 0; i < 32; ++i) {
        const auto word = number<std::uint16_t>(block + 34, i / 4);
        const int code = block[2 + i] | (word >> 3 * (i % 4) & 7) << 8;
        put_moved(code, word >> 15 & 1, d * static_cast<float>(2 * (word >> 12 & 7) + 1),
                  out + 8 * i);
    }
}

// The lower bits of 32 codes, nibbles with three upper bits and the direction, and four words with
// four scales of three bits and a quarter of d each.
void iq1_m(Bytes block, float* out) {
    unsigned bits = 0;
    for (Index i = 0; i < 4; ++i) bits |= number<std::uint16_t>(block + 48, i) >> 12 << 4 * i;
    const auto d = static_cast<float>(std::bit_cast<Eigen::half>(static_cast<std::uint16_t>(bits)));
    for (Index i = 0; i < 32; ++i) {
        const int upper = nibble(block + 32, i);
        const Index group = i / 2;
        const int scale = number<std::uint16_t>(block + 48, group / 4) >> 3 * (group % 4) & 7;
        put_moved(block[i] | (upper & 7) << 8, upper & 8, d * static_cast<float>(2 * scale + 1),
                  out + 8 * i);
    }
}

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
    {"IQ1_S", 256, 50, iq1_s},   {"IQ1_M", 256, 56, iq1_m}, {"IQ2_XXS", 256, 66, iq2_xxs},
    {"IQ2_XS", 256, 74, iq2_xs}, {"IQ2_S", 256, 82, iq2_s}, {"IQ3_XXS", 256, 98, iq3_xxs},
    {"IQ3_S", 256, 110, iq3_s},  {"TQ1_0", 256, 54, tq1_0}, {"TQ2_0", 256, 66, tq2_0},
    {"Q1_0", 128, 18, q1_0},     {"Q2_0", 64, 18, q2_0},
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
    parallel_for(blocks.rows(), decoded_rows, [&](Index first, Index last) {
        for (Index i = first * count; i < last * count; ++i)
            type.decode(blocks.data() + i * type.bytes, weights.data() + i * type.weights);
    });
}

}  // namespace bitwright
