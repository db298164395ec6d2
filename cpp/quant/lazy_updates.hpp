// GPTQ's lazy batch updates (arXiv:2210.17323, section 3.3, step 2), taken by halves.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// Solves columns [low, high) from left to right, where each changes all to the right of it.
//
// The paper takes blocks of B columns: within a block every column updates the others at once, and
// the rest of the matrix is updated once per block (eq. 4), since a rank-B product is bound by
// arithmetic where B rank-1 products are bound by memory. Here the columns are halved until they
// are at most `block`, and an update reaches from one whole half to the other: the same sums, but
// the products grow with the distance that they bridge, up to half of the matrix.
//
// solve(low, high) takes one block; push(low, middle, high) carries what [low, middle) has changed
// to [middle, high) before that is solved; back(low, middle, high) the other way, once both are.
template <typename Solve, typename Push, typename Back>
void lazy_updates(Index low, Index high, Index block, const Solve& solve, const Push& push,
                  const Back& back) {
    if (high - low <= block) {
        solve(low, high);
        return;
    }
    const Index blocks = (high - low + block - 1) / block;
    const Index middle = low + (blocks + 1) / 2 * block;
    lazy_updates(low, middle, block, solve, push, back);
    push(low, middle, high);
    lazy_updates(middle, high, block, solve, push, back);
    back(low, middle, high);
}

// For a direction in which nothing is to be carried.
inline void no_update(Index, Index, Index) {}

}  // namespace bitwright
