// GGUF's blocks of 32 weights and superblocks of 256, as ggml's structs lie in memory.
#pragma once

#include "quant/superblocks.hpp"

namespace bitwright {

constexpr Index weights_per_block = 32;  // of the types that have no superblocks

// The bytes of a block, with a bias beside its scale if it is affine, and of a superblock.
Index block_bytes(int bits, bool affine);
Index superblock_bytes(const KGrid& grid);

// Codes [out, in] of 4, 5 or 8 bits with one scale d and, for affine grids, one bias m for every 32
// weights, both [out, in / 32], to blocks [out, in / 32 · block_bytes]. m is empty where there is
// none.
void pack_blocks(ConstMatrixView<std::uint8_t> codes, ConstMatrixView<Eigen::half> d,
                 ConstMatrixView<Eigen::half> m, int bits, MatrixView<std::uint8_t> blocks);

// The reverse.
void unpack_blocks(ConstMatrixView<std::uint8_t> blocks, int bits, MatrixView<std::uint8_t> codes,
                   MatrixView<Eigen::half> d, MatrixView<Eigen::half> m);

// Codes [out, in] of 2 to 6 bits with their superblocks to blocks [out, in / 256 ·
// superblock_bytes].
void pack_superblocks(ConstMatrixView<std::uint8_t> codes, const SuperblocksView& grids,
                      const KGrid& grid, MatrixView<std::uint8_t> blocks);

// The reverse.
void unpack_superblocks(ConstMatrixView<std::uint8_t> blocks, const KGrid& grid,
                        MatrixView<std::uint8_t> codes, SuperblocksView grids);

}  // namespace bitwright
