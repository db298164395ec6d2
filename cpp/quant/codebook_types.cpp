#include "quant/codebook_types.hpp"

#include <atomic>
#include <bit>
#include <cstring>

#include "quant/stored_blocks.hpp"

namespace bitwright {
namespace {

using Bytes = const std::uint8_t*;
using Block = std::uint8_t*;

std::uint8_t field(Bytes bytes, size_t index, int bits) {
    const size_t each = 8 / static_cast<size_t>(bits);
    return static_cast<std::uint8_t>(bytes[index / each] >> bits * static_cast<int>(index % each) &
                                     ((1 << bits) - 1));
}
void store_field(int value, Block bytes, size_t index, int bits) {
    const size_t each = 8 / static_cast<size_t>(bits);
    bytes[index / each] = static_cast<std::uint8_t>(bytes[index / each] |
                                                    value << bits * static_cast<int>(index % each));
}
std::uint16_t joined(int low, int high) { return static_cast<std::uint16_t>(low | high << 8); }

// Seven signs are stored; the eighth makes their number even.
std::uint8_t even_signs(unsigned seven) {
    return static_cast<std::uint8_t>(seven | static_cast<unsigned>(std::popcount(seven) & 1) << 7);
}

// A word for every 32 weights: four times seven signs, and a scale.
void unpack_words(Bytes words, Index stride, VectorBlock& parts) {
    for (size_t group = 0; group < 8; ++group) {
        const auto word = load_number<std::uint32_t>(words + static_cast<Index>(group) * stride);
        for (size_t i = 0; i < 4; ++i) parts.signs[4 * group + i] = even_signs(word >> 7 * i & 127);
        parts.scales[group] = static_cast<std::uint8_t>(word >> 28);
    }
}
void pack_words(const VectorBlock& parts, Block words, Index stride) {
    for (size_t group = 0; group < 8; ++group) {
        std::uint32_t word = static_cast<std::uint32_t>(parts.scales[group]) << 28;
        for (size_t i = 0; i < 4; ++i)
            word |= static_cast<std::uint32_t>(parts.signs[4 * group + i] & 127) << 7 * i;
        store_number(word, words + static_cast<Index>(group) * stride);
    }
}

// d, then for every 32 weights four codes and a word.
struct Iq2Xxs {
    static void unpack(Bytes block, VectorBlock& parts) {
        parts.d = load_number<Eigen::half>(block);
        for (size_t i = 0; i < 32; ++i) parts.vectors[i] = block[2 + i / 4 * 8 + i % 4];
        unpack_words(block + 6, 8, parts);
    }
    static void pack(const VectorBlock& parts, Block block) {
        store_number(parts.d, block);
        for (size_t i = 0; i < 32; ++i)
            block[2 + i / 4 * 8 + i % 4] = static_cast<std::uint8_t>(parts.vectors[i]);
        pack_words(parts, block + 6, 8);
    }
};

// d, 32 codes of nine bits with seven signs, and 16 scales.
struct Iq2Xs {
    static void unpack(Bytes block, VectorBlock& parts) {
        parts.d = load_number<Eigen::half>(block);
        for (size_t i = 0; i < 32; ++i) {
            const auto word = load_number<std::uint16_t>(block + 2, static_cast<Index>(i));
            parts.vectors[i] = word & 511;
            parts.signs[i] = even_signs(word >> 9);
        }
        for (size_t i = 0; i < 16; ++i) parts.scales[i] = field(block + 66, i, 4);
    }
    static void pack(const VectorBlock& parts, Block block) {
        store_number(parts.d, block);
        for (size_t i = 0; i < 32; ++i)
            store_number(static_cast<std::uint16_t>(parts.vectors[i] | (parts.signs[i] & 127) << 9),
                         block + 2, static_cast<Index>(i));
        for (size_t i = 0; i < 16; ++i) store_field(parts.scales[i], block + 66, i, 4);
    }
};

// d, the lower bits of 32 codes, their signs, the upper two bits, and 16 scales.
struct Iq2S {
    static void unpack(Bytes block, VectorBlock& parts) {
        parts.d = load_number<Eigen::half>(block);
        for (size_t i = 0; i < 32; ++i) {
            parts.vectors[i] = joined(block[2 + i], field(block + 66, i, 2));
            parts.signs[i] = block[34 + i];
        }
        for (size_t i = 0; i < 16; ++i) parts.scales[i] = field(block + 74, i, 4);
    }
    static void pack(const VectorBlock& parts, Block block) {
        store_number(parts.d, block);
        for (size_t i = 0; i < 32; ++i) {
            block[2 + i] = static_cast<std::uint8_t>(parts.vectors[i] & 255);
            store_field(parts.vectors[i] >> 8, block + 66, i, 2);
            block[34 + i] = parts.signs[i];
        }
        for (size_t i = 0; i < 16; ++i) store_field(parts.scales[i], block + 74, i, 4);
    }
};

// d, 64 codes, and a word for every 32 weights.
struct Iq3Xxs {
    static void unpack(Bytes block, VectorBlock& parts) {
        parts.d = load_number<Eigen::half>(block);
        for (size_t i = 0; i < 64; ++i) parts.vectors[i] = block[2 + i];
        unpack_words(block + 66, 4, parts);
    }
    static void pack(const VectorBlock& parts, Block block) {
        store_number(parts.d, block);
        for (size_t i = 0; i < 64; ++i) block[2 + i] = static_cast<std::uint8_t>(parts.vectors[i]);
        pack_words(parts, block + 66, 4);
    }
};

// d, the lower bits of 64 codes, the upper bit, the signs, and 8 scales.
struct Iq3S {
    static void unpack(Bytes block, VectorBlock& parts) {
        parts.d = load_number<Eigen::half>(block);
        for (size_t i = 0; i < 64; ++i)
            parts.vectors[i] = joined(block[2 + i], field(block + 66, i, 1));
        std::memcpy(parts.signs.data(), block + 74, parts.signs.size());
        for (size_t i = 0; i < 8; ++i) parts.scales[i] = field(block + 106, i, 4);
    }
    static void pack(const VectorBlock& parts, Block block) {
        store_number(parts.d, block);
        for (size_t i = 0; i < 64; ++i) {
            block[2 + i] = static_cast<std::uint8_t>(parts.vectors[i] & 255);
            store_field(parts.vectors[i] >> 8, block + 66, i, 1);
        }
        std::memcpy(block + 74, parts.signs.data(), parts.signs.size());
        for (size_t i = 0; i < 8; ++i) store_field(parts.scales[i], block + 106, i, 4);
    }
};

// d, the lower bits of 32 codes, and for every 32 weights a word: four times three upper bits, a
// scale, and the direction.
struct Iq1S {
    static void unpack(Bytes block, VectorBlock& parts) {
        parts.d = load_number<Eigen::half>(block);
        for (size_t i = 0; i < 32; ++i) {
            const auto word = load_number<std::uint16_t>(block + 34, static_cast<Index>(i / 4));
            parts.vectors[i] = joined(block[2 + i], word >> 3 * (i % 4) & 7);
            parts.signs[i] = static_cast<std::uint8_t>(word >> 15);
            parts.scales[i / 4] = static_cast<std::uint8_t>(word >> 12 & 7);
        }
    }
    static void pack(const VectorBlock& parts, Block block) {
        store_number(parts.d, block);
        for (size_t group = 0; group < 8; ++group) {
            unsigned word = static_cast<unsigned>(parts.scales[group]) << 12 |
                            static_cast<unsigned>(parts.signs[4 * group]) << 15;
            for (size_t i = 0; i < 4; ++i)
                word |= static_cast<unsigned>(parts.vectors[4 * group + i] >> 8) << 3 * i;
            store_number(static_cast<std::uint16_t>(word), block + 34, static_cast<Index>(group));
        }
        for (size_t i = 0; i < 32; ++i)
            block[2 + i] = static_cast<std::uint8_t>(parts.vectors[i] & 255);
    }
};

// The lower bits of 32 codes, nibbles with three upper bits and the direction, and four words with
// four scales of three bits and a quarter of d each.
struct Iq1M {
    static void unpack(Bytes block, VectorBlock& parts) {
        unsigned bits = 0;
        for (size_t i = 0; i < 4; ++i) {
            const auto word = load_number<std::uint16_t>(block + 48, static_cast<Index>(i));
            bits |= static_cast<unsigned>(word >> 12) << 4 * i;
            for (size_t j = 0; j < 4; ++j)
                parts.scales[4 * i + j] = static_cast<std::uint8_t>(word >> 3 * j & 7);
        }
        parts.d = std::bit_cast<Eigen::half>(static_cast<std::uint16_t>(bits));
        for (size_t i = 0; i < 32; ++i) {
            const int upper = field(block + 32, i, 4);
            parts.vectors[i] = joined(block[i], upper & 7);
            parts.signs[i] = static_cast<std::uint8_t>(upper >> 3);
        }
    }
    static void pack(const VectorBlock& parts, Block block) {
        const unsigned bits = std::bit_cast<std::uint16_t>(parts.d);
        for (size_t i = 0; i < 4; ++i) {
            unsigned word = (bits >> 4 * i & 15) << 12;
            for (size_t j = 0; j < 4; ++j)
                word |= static_cast<unsigned>(parts.scales[4 * i + j]) << 3 * j;
            store_number(static_cast<std::uint16_t>(word), block + 48, static_cast<Index>(i));
        }
        for (size_t i = 0; i < 32; ++i) {
            block[i] = static_cast<std::uint8_t>(parts.vectors[i] & 255);
            store_field(parts.vectors[i] >> 8 | parts.signs[i] << 3, block + 32, i, 4);
        }
    }
};

template <typename Layout>
constexpr CodebookType type_of(std::string_view name, CodebookName book, Index bytes,
                               Index group_size, Signs signs, int top_scale, float unit) {
    return {name, book, bytes, group_size, signs, top_scale, unit, Layout::unpack, Layout::pack};
}

constexpr std::array vector_types = {
    type_of<Iq1S>("IQ1_S", CodebookName::iq1, 50, 32, Signs::moved_groups, 15, 1.0f),
    type_of<Iq1M>("IQ1_M", CodebookName::iq1, 56, 16, Signs::moved, 15, 1.0f),
    type_of<Iq2Xxs>("IQ2_XXS", CodebookName::iq2_xxs, 66, 32, Signs::even, 31, 0.125f),
    type_of<Iq2Xs>("IQ2_XS", CodebookName::iq2_xs, 74, 16, Signs::even, 31, 0.125f),
    type_of<Iq2S>("IQ2_S", CodebookName::iq2_s, 82, 16, Signs::free, 31, 0.125f),
    type_of<Iq3Xxs>("IQ3_XXS", CodebookName::iq3_xxs, 98, 32, Signs::even, 31, 0.25f),
    type_of<Iq3S>("IQ3_S", CodebookName::iq3_s, 110, 32, Signs::free, 31, 1.0f),
};

// The digit and the sign, or direction, of a weight's code.
struct Digit {
    Index place;
    bool negative;
};
Digit digit_of(const CodebookType& type, Index code) {
    const Index base = type.vectors().base();
    if (type.is_moved()) return {code / 2, code % 2 == 0};
    return code < base ? Digit{base - 1 - code, true} : Digit{code - base, false};
}

// False if the codes of a unit are none that the type stores.
bool pack_unit(const CodebookType& type, const std::uint8_t* codes, size_t unit,
               VectorBlock& parts) {
    const Codebook& book = type.vectors();
    const auto vectors = static_cast<size_t>(type.vectors_per_unit());
    unsigned signs = 0;
    for (size_t vector = 0; vector < vectors; ++vector) {
        Index number = 0, power = 1;
        for (Index i = 0; i < book.width; ++i, power *= book.base()) {
            const Index at = static_cast<Index>(vector) * book.width + i;
            if (codes[at] >= type.points()) return false;
            const auto [place, negative] = digit_of(type, codes[at]);
            number += place * power;
            signs |= static_cast<unsigned>(negative) << at;
        }
        const std::int16_t code = book.codes[static_cast<size_t>(number)];
        if (code < 0) return false;
        parts.vectors[unit * vectors + vector] = static_cast<std::uint16_t>(code);
    }
    if (type.is_moved() && signs != 0 && signs != 255) return false;
    if (type.signs == Signs::even && std::popcount(signs) % 2 != 0) return false;
    parts.signs[unit] = static_cast<std::uint8_t>(type.is_moved() ? signs & 1 : signs);
    const auto first = unit / 4 * 4;
    return type.signs != Signs::moved_groups || parts.signs[unit] == parts.signs[first];
}

}  // namespace

std::uint8_t CodebookType::code(Index digit, bool negative) const {
    const Index base = vectors().base();
    if (is_moved()) return static_cast<std::uint8_t>(2 * digit + !negative);
    return static_cast<std::uint8_t>(negative ? base - 1 - digit : base + digit);
}

float CodebookType::point(std::uint8_t code) const {
    const auto [place, negative] = digit_of(*this, code);
    const float magnitude = static_cast<float>(vectors().magnitudes[static_cast<size_t>(place)]);
    if (is_moved()) return magnitude + (negative ? -0.125f : 0.125f);
    return negative ? -magnitude * unit : magnitude * unit;
}

const CodebookType* codebook_type(std::string_view name) {
    for (const CodebookType& type : vector_types)
        if (type.name == name) return &type;
    return nullptr;
}

bool pack_vectors(ConstMatrixView<std::uint8_t> codes, const SuperblocksView& grids,
                  const CodebookType& type, MatrixView<std::uint8_t> blocks) {
    const Index groups = superblock_size / type.group_size;
    std::atomic<bool> held{true};
    each_block(type.bytes, blocks, [&](Index row, Index block, std::uint8_t* bytes) {
        VectorBlock parts;
        parts.d = grids.d(row, block);
        for (Index group = 0; group < groups; ++group) {
            const auto scale = grids.scale_codes(row, block * groups + group);
            if (scale < 1 || scale > type.top_scale || scale % 2 == 0) held = false;
            parts.scales[static_cast<size_t>(group)] = static_cast<std::uint8_t>(scale / 2 & 15);
        }
        const std::uint8_t* here = codes.data() + row * codes.cols() + block * superblock_size;
        for (size_t unit = 0; unit < units_per_block; ++unit)
            if (!pack_unit(type, here + static_cast<Index>(unit) * unit_size, unit, parts))
                held = false;
        std::memset(bytes, 0, static_cast<size_t>(type.bytes));
        type.pack(parts, bytes);
    });
    return held;
}

void unpack_vectors(ConstMatrixView<std::uint8_t> blocks, const CodebookType& type,
                    MatrixView<std::uint8_t> codes, SuperblocksView grids) {
    const Index groups = superblock_size / type.group_size;
    const Codebook& book = type.vectors();
    each_block(type.bytes, blocks, [&](Index row, Index block, const std::uint8_t* bytes) {
        VectorBlock parts;
        type.unpack(bytes, parts);
        grids.d(row, block) = parts.d;
        for (Index group = 0; group < groups; ++group)
            grids.scale_codes(row, block * groups + group) =
                static_cast<std::int8_t>(2 * parts.scales[static_cast<size_t>(group)] + 1);
        std::uint8_t* target = codes.data() + row * codes.cols() + block * superblock_size;
        for (Index i = 0; i < superblock_size; ++i) {
            const auto vector = parts.vectors[static_cast<size_t>(i / book.width)];
            const std::int8_t value = book.vector(vector)[i % book.width];
            Index place = 0;
            while (book.magnitudes[static_cast<size_t>(place)] != value) ++place;
            const unsigned signs = parts.signs[static_cast<size_t>(i / unit_size)];
            target[i] = type.code(place, type.is_moved() ? signs : signs >> i % unit_size & 1);
        }
    });
}

}  // namespace bitwright
