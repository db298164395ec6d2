#include "quant/gguf_blocks.hpp"

#include <algorithm>
#include <array>
#include <type_traits>

#include "quant/stored_blocks.hpp"

namespace bitwright {
namespace {

constexpr int most_values = 32;  // scales and mins of a superblock

// Bits [shift, shift + bits) of `count` values, from byte `offset` of a struct on: the lowest bits
// of `width` bytes hold those of the first `width` values, the next bits the next, until they are
// full, and so on for the next bytes.
struct BitPlane {
    Index offset;
    int bits, width, shift, count;

    void pack(const std::uint8_t* values, std::uint8_t* block) const {
        with_width([&](auto fixed) { pack_runs<decltype(fixed)::value>(values, block); });
    }
    void unpack(const std::uint8_t* block, std::uint8_t* values) const {
        with_width([&](auto fixed) { unpack_runs<decltype(fixed)::value>(block, values); });
    }

  private:
    // Widths are few: loops of known lengths over bytes of their own are taken in registers.
    template <typename Body>
    void with_width(const Body& body) const {
        switch (width) {
            case 1:
                return body(std::integral_constant<int, 1>{});
            case 4:
                return body(std::integral_constant<int, 4>{});
            case 8:
                return body(std::integral_constant<int, 8>{});
            case 16:
                return body(std::integral_constant<int, 16>{});
            case 32:
                return body(std::integral_constant<int, 32>{});
            default:
                return body(std::integral_constant<int, 64>{});
        }
    }

    template <int size>
    void pack_runs(const std::uint8_t* values, std::uint8_t* block) const {
        const int mask = (1 << bits) - 1;
        std::uint8_t* bytes = block + offset;
        for (int done = 0; done < count; bytes += size) {
            std::array<std::uint8_t, size> merged;
            std::copy_n(bytes, size, merged.data());
            for (int place = 0; place < 8; place += bits, done += size)
                for (int i = 0; i < size; ++i)
                    merged[static_cast<size_t>(i)] =
                        static_cast<std::uint8_t>(merged[static_cast<size_t>(i)] |
                                                  (values[done + i] >> shift & mask) << place);
            std::copy_n(merged.data(), size, bytes);
        }
    }

    template <int size>
    void unpack_runs(const std::uint8_t* block, std::uint8_t* values) const {
        const int mask = (1 << bits) - 1;
        const std::uint8_t* bytes = block + offset;
        for (int done = 0; done < count; bytes += size) {
            std::array<std::uint8_t, size> merged;
            std::copy_n(bytes, size, merged.data());
            for (int place = 0; place < 8; place += bits, done += size)
                for (int i = 0; i < size; ++i)
                    values[done + i] = static_cast<std::uint8_t>(
                        values[done + i] | (merged[static_cast<size_t>(i)] >> place & mask)
                                               << shift);
        }
    }
};

// A struct of ggml's. A plane of no bits is none.
struct Layout {
    Index bytes;
    Index d, bias;  // where these float16 are; bias −1: nowhere
    std::array<BitPlane, 2> codes;
    std::array<BitPlane, 2> scales;  // of the codes of scales, and mins after them
    std::uint8_t code_flip = 0;      // of a code's bits; two's complement of 8 bits has one flipped

    template <typename Planes>
    static void pack(const Planes& planes, const std::uint8_t* values, std::uint8_t* block) {
        for (const BitPlane& plane : planes)
            if (plane.bits > 0) plane.pack(values, block);
    }
    template <typename Planes>
    static void unpack(const Planes& planes, const std::uint8_t* block, std::uint8_t* values) {
        for (const BitPlane& plane : planes)
            if (plane.bits > 0) plane.unpack(block, values);
    }
};

Layout layout_of_blocks(int bits, bool affine) {
    const Index head = affine ? 4 : 2, bias = affine ? 2 : -1;  // d and m
    if (bits == 8) return {head + 32, 0, bias, {{{head, 8, 32, 0, 32}}}, {}, 0x80};
    if (bits == 4) return {head + 16, 0, bias, {{{head, 4, 16, 0, 32}}}, {}};
    return {head + 20, 0, bias, {{{head + 4, 4, 16, 0, 32}, {head, 1, 1, 4, 32}}}, {}};
}

Layout layout_of_superblocks(const KGrid& grid) {
    // Sixteen bits of the upper parts of scales, then their lower parts.
    if (grid.table)
        return {136, 0, -1, {{{8, 4, 16, 0, 256}}}, {{{4, 4, 1, 0, 8}, {2, 2, 1, 4, 8}}}};
    switch (grid.bits) {
        case 2:
            return {84, 80, 82, {{{16, 2, 32, 0, 256}}}, {{{0, 4, 16, 0, 32}}}};
        case 3:
            return {110,
                    108,
                    -1,
                    {{{32, 2, 32, 0, 256}, {0, 1, 32, 2, 256}}},
                    {{{96, 4, 8, 0, 16}, {104, 2, 4, 4, 16}}}};
        case 4:
            return {144, 0, 2, {{{16, 4, 32, 0, 256}}}, {}};
        case 5:
            return {176, 0, 2, {{{48, 4, 32, 0, 256}, {16, 1, 32, 4, 256}}}, {}};
        default:
            return {210,
                    208,
                    -1,
                    {{{0, 4, 64, 0, 256}, {128, 2, 32, 4, 256}}},
                    {{{192, 8, 16, 0, 16}}}};
    }
}

// Eight scales and eight mins of six bits in 12 bytes of Q4_K and Q5_K: the first four of both are
// whole, the other four lie in a third row of nibbles and in the upper bits of the first two rows.
constexpr Index six_bits_at = 4;
void pack_six_bits(const std::uint8_t* values, std::uint8_t* packed) {
    const std::uint8_t *scales = values, *mins = values + 8;
    for (int i = 0; i < 4; ++i) {
        packed[i] = static_cast<std::uint8_t>(scales[i] | scales[i + 4] >> 4 << 6);
        packed[i + 4] = static_cast<std::uint8_t>(mins[i] | mins[i + 4] >> 4 << 6);
        packed[i + 8] = static_cast<std::uint8_t>((scales[i + 4] & 15) | (mins[i + 4] & 15) << 4);
    }
}
void unpack_six_bits(const std::uint8_t* packed, std::uint8_t* values) {
    std::uint8_t *scales = values, *mins = values + 8;
    for (int i = 0; i < 4; ++i) {
        scales[i] = packed[i] & 63;
        scales[i + 4] = static_cast<std::uint8_t>((packed[i + 8] & 15) | packed[i] >> 6 << 4);
        mins[i] = packed[i + 4] & 63;
        mins[i + 4] = static_cast<std::uint8_t>(packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4);
    }
}

bool has_six_bits(const KGrid& grid) { return !grid.table && (grid.bits == 4 || grid.bits == 5); }
// What makes codes unsigned.
int scale_bias(const KGrid& grid) { return grid.bits == 3 || grid.table ? 32 : 0; }

}  // namespace

Index block_bytes(int bits, bool affine) { return layout_of_blocks(bits, affine).bytes; }
Index superblock_bytes(const KGrid& grid) { return layout_of_superblocks(grid).bytes; }

void pack_blocks(ConstMatrixView<std::uint8_t> codes, ConstMatrixView<Eigen::half> d,
                 ConstMatrixView<Eigen::half> m, int bits, MatrixView<std::uint8_t> blocks) {
    const Layout layout = layout_of_blocks(bits, m.size() > 0);
    each_block(layout.bytes, blocks, [&](Index row, Index block, std::uint8_t* bytes) {
        std::fill_n(bytes, layout.bytes, std::uint8_t{0});
        store_number<Eigen::half>(d(row, block), bytes + layout.d);
        if (layout.bias >= 0) store_number<Eigen::half>(m(row, block), bytes + layout.bias);
        std::array<std::uint8_t, weights_per_block> values;
        for (Index i = 0; i < weights_per_block; ++i)
            values[static_cast<size_t>(i)] =
                codes(row, block * weights_per_block + i) ^ layout.code_flip;
        Layout::pack(layout.codes, values.data(), bytes);
    });
}

void unpack_blocks(ConstMatrixView<std::uint8_t> blocks, int bits, MatrixView<std::uint8_t> codes,
                   MatrixView<Eigen::half> d, MatrixView<Eigen::half> m) {
    const Layout layout = layout_of_blocks(bits, m.size() > 0);
    each_block(layout.bytes, blocks, [&](Index row, Index block, const std::uint8_t* bytes) {
        d(row, block) = load_number<Eigen::half>(bytes + layout.d);
        if (layout.bias >= 0) m(row, block) = load_number<Eigen::half>(bytes + layout.bias);
        std::uint8_t* values = codes.data() + row * codes.cols() + block * weights_per_block;
        std::fill_n(values, weights_per_block, std::uint8_t{0});
        Layout::unpack(layout.codes, bytes, values);
        for (Index i = 0; i < weights_per_block; ++i) values[i] ^= layout.code_flip;
    });
}

void pack_superblocks(ConstMatrixView<std::uint8_t> codes, const SuperblocksView& grids,
                      const KGrid& grid, MatrixView<std::uint8_t> blocks) {
    const Layout layout = layout_of_superblocks(grid);
    const Index groups = grid.groups();
    const int bias = scale_bias(grid);
    each_block(layout.bytes, blocks, [&](Index row, Index block, std::uint8_t* bytes) {
        std::fill_n(bytes, layout.bytes, std::uint8_t{0});
        store_number<Eigen::half>(grids.d(row, block), bytes + layout.d);
        std::array<std::uint8_t, most_values> values{};
        for (Index i = 0; i < groups; ++i)
            values[static_cast<size_t>(i)] =
                static_cast<std::uint8_t>(grids.scale_codes(row, block * groups + i) + bias);
        if (grid.affine) {
            store_number<Eigen::half>(grids.dmin(row, block), bytes + layout.bias);
            for (Index i = 0; i < groups; ++i)
                values[static_cast<size_t>(groups + i)] = grids.min_codes(row, block * groups + i);
        }
        if (has_six_bits(grid))
            pack_six_bits(values.data(), bytes + six_bits_at);
        else
            Layout::pack(layout.scales, values.data(), bytes);
        Layout::pack(layout.codes, codes.data() + row * codes.cols() + block * superblock_size,
                     bytes);
    });
}

void unpack_superblocks(ConstMatrixView<std::uint8_t> blocks, const KGrid& grid,
                        MatrixView<std::uint8_t> codes, SuperblocksView grids) {
    const Layout layout = layout_of_superblocks(grid);
    const Index groups = grid.groups();
    const int bias = scale_bias(grid);
    each_block(layout.bytes, blocks, [&](Index row, Index block, const std::uint8_t* bytes) {
        grids.d(row, block) = load_number<Eigen::half>(bytes + layout.d);
        std::array<std::uint8_t, most_values> values{};
        if (has_six_bits(grid))
            unpack_six_bits(bytes + six_bits_at, values.data());
        else
            Layout::unpack(layout.scales, bytes, values.data());
        for (Index i = 0; i < groups; ++i)
            grids.scale_codes(row, block * groups + i) =
                static_cast<std::int8_t>(values[static_cast<size_t>(i)] - bias);
        if (grid.affine) {
            grids.dmin(row, block) = load_number<Eigen::half>(bytes + layout.bias);
            for (Index i = 0; i < groups; ++i)
                grids.min_codes(row, block * groups + i) = values[static_cast<size_t>(groups + i)];
        }
        std::uint8_t* target = codes.data() + row * codes.cols() + block * superblock_size;
        std::fill_n(target, superblock_size, std::uint8_t{0});
        Layout::unpack(layout.codes, bytes, target);
    });
}

}  // namespace bitwright
