// Matrix products whose bits depend on their shapes alone, not on the number of threads.
//
// A BLAS that shares a product among threads gives each of them another shape, which other kernels
// compute in another order, on some processors and not on others. So an output is cut into tiles
// here, and each is one product on one thread.
#pragma once

#include <algorithm>
#include <type_traits>

#include "linalg/threads.hpp"

namespace bitwright {

// The tiles of an output [rows, columns]: large ones, since each packs its own panels of both
// factors, but more than one for a small output, too, so that all threads have work.
struct Tiling {
    Index rows, columns;            // of the output
    Index tile_rows, tile_columns;  // of all tiles but the last ones

    Tiling(Index height, Index width)
        : rows(height),
          columns(width),
          tile_rows(even_share(height, largest)),
          tile_columns(even_share(width, largest)) {
        while (count() < enough && std::max(tile_rows, tile_columns) > smallest) {
            Index& longer = tile_rows >= tile_columns ? tile_rows : tile_columns;
            longer = even_share(longer, (longer + 1) / 2);
        }
    }

    Index down() const { return (rows + tile_rows - 1) / tile_rows; }
    Index across() const { return (columns + tile_columns - 1) / tile_columns; }
    Index count() const { return down() * across(); }

    // body(row, rows, column, columns) for every tile
    template <typename Body>
    void each(const Body& body) const {
        const Index wide = across();
        parallel_for(count(), 1, [&](Index first, Index last) {
            for (Index tile = first; tile < last; ++tile) {
                const Index row = tile / wide * tile_rows, column = tile % wide * tile_columns;
                body(row, std::min(tile_rows, rows - row), column,
                     std::min(tile_columns, columns - column));
            }
        });
    }

    // The same, for the square tiles of side `tile_rows` in the lower triangle, diagonal included.
    template <typename Body>
    void each_lower(const Body& body) const {
        const Index pieces = down();
        parallel_for(pieces * pieces, 1, [&](Index first, Index last) {
            for (Index tile = first; tile < last; ++tile) {
                const Index row = tile / pieces * tile_rows, column = tile % pieces * tile_rows;
                if (column <= row)
                    body(row, std::min(tile_rows, rows - row), column,
                         std::min(tile_rows, rows - column));
            }
        });
    }

  private:
    static constexpr Index largest = 512, smallest = 128, enough = 8, registers = 16;

    // The least length, in whole registers, at which no more pieces are needed than at `most`.
    static Index even_share(Index length, Index most) {
        const Index pieces = std::max<Index>(1, (length + most - 1) / most);
        const Index share = (length + pieces - 1) / pieces;
        return std::max<Index>(1, (share + registers - 1) / registers * registers);
    }
};

// A factor in the scalar of the product: itself, or a copy of what a tile needs of one that is
// stored in 16 bits.
template <typename Scalar, typename Factor>
decltype(auto) widened(const Factor& factor) {
    if constexpr (std::is_same_v<Scalar, typename Factor::Scalar>)
        return (factor);  // a reference. NOLINT(readability-redundant-parentheses)
    else
        return Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic,
                             Factor::IsRowMajor ? Eigen::RowMajor : Eigen::ColMajor>(
            factor.template cast<Scalar>());
}

// output = left · right
template <typename Output, typename Left, typename Right>
void set_product(Output&& output, const Left& left, const Right& right) {
    Tiling(output.rows(), output.cols())
        .each([&](Index row, Index rows, Index column, Index columns) {
            output.block(row, column, rows, columns).noalias() =
                left.middleRows(row, rows) *
                widened<typename Left::Scalar>(right.middleCols(column, columns));
        });
}

// output += factor · left · right
template <typename Output, typename Left, typename Right>
void add_product(Output&& output, const Left& left, const Right& right,
                 typename Left::Scalar factor = 1) {
    Tiling(output.rows(), output.cols())
        .each([&](Index row, Index rows, Index column, Index columns) {
            output.block(row, column, rows, columns).noalias() +=
                factor * left.middleRows(row, rows) *
                widened<typename Left::Scalar>(right.middleCols(column, columns));
        });
}

// The lower triangle of output += factor · left · leftᵀ
template <typename Output, typename Left>
void add_lower_product(Output&& output, const Left& left, typename Left::Scalar factor = 1) {
    Tiling(output.rows(), output.cols())
        .each_lower([&](Index row, Index rows, Index column, Index columns) {
            auto tile = output.block(row, column, rows, columns);
            if (row == column)
                tile.template selfadjointView<Eigen::Lower>().rankUpdate(left.middleRows(row, rows),
                                                                         factor);
            else
                tile.noalias() += factor * left.middleRows(row, rows) *
                                  left.middleRows(column, columns).transpose();
        });
}

}  // namespace bitwright
