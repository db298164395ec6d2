// The types of GGUF whose codes stand for vectors of a codebook, and how their blocks lie in
// memory.
#pragma once

#include <array>
#include <string_view>

#include "quant/codebooks.hpp"
#include "quant/superblocks.hpp"

namespace bitwright {

constexpr Index unit_size = 8;  // weights that share a byte of signs, or a direction
constexpr Index units_per_block = superblock_size / unit_size;

// One block of 256 weights. The scale of group g is d·(2·scales[g] + 1).
struct VectorBlock {
    Eigen::half d{0.0f};
    std::array<std::uint16_t, 64> vectors{};
    // Of each unit: bit i is set if weight i is negative; or 1 if all of it are moved down.
    std::array<std::uint8_t, units_per_block> signs{};
    std::array<std::uint8_t, 16> scales{};
};

// Whether the signs of a unit are free, or an even number of them is negative; or there are none,
// but each unit, or all units of a group, are moved up or down by an eighth.
enum class Signs : std::uint8_t { free, even, moved, moved_groups };

struct CodebookType {
    std::string_view name;
    CodebookName book;
    Index bytes;
    Index group_size;
    Signs signs;
    int top_scale;  // the largest 2·scales[g] + 1
    float unit;     // what a magnitude of the codebook is in weights of the scale 1
    void (*unpack)(const std::uint8_t* block, VectorBlock& parts);
    void (*pack)(const VectorBlock& parts, std::uint8_t* block);  // to a block of zeros

    const Codebook& vectors() const { return codebook(book); }
    bool is_moved() const { return signs == Signs::moved || signs == Signs::moved_groups; }
    Index vectors_per_unit() const { return unit_size / vectors().width; }
    KGrid scales() const { return {4, group_size, false, 1, top_scale, true, true}; }

    // Every weight has a code by itself: the place of its value among all, in rising order.
    std::uint8_t code(Index digit, bool negative) const;
    float point(std::uint8_t code) const;
    int points() const { return static_cast<int>(2 * vectors().base()); }
};

// The type of this name, such as IQ3_S; null where there is none.
const CodebookType* codebook_type(std::string_view name);

// Codes of single weights [out, in] with their superblocks to blocks [out, in / 256 · bytes]. False
// if they are no vectors of the codebook, or have signs or scales that the type does not store.
bool pack_vectors(ConstMatrixView<std::uint8_t> codes, const SuperblocksView& grids,
                  const CodebookType& type, MatrixView<std::uint8_t> blocks);

// The reverse, of any blocks.
void unpack_vectors(ConstMatrixView<std::uint8_t> blocks, const CodebookType& type,
                    MatrixView<std::uint8_t> codes, SuperblocksView grids);

}  // namespace bitwright
