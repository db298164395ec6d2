// The "k" grids of GGUF: scales and mins of the groups in 256 weights are codes themselves.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

constexpr Index superblock_size = 256;  // weights that share the scale of their scales

// What the bits of a "k" grid stand for, Q2_K to Q6_K; IQ4_XS, a table with superblocks, and types
// with codebooks.
struct KGrid {
    int bits;
    Index group_size;
    bool affine;    // w = scale·c − min, otherwise w = scale·(c − 2^(bits − 1)) or scale·T[c]
    int low, high;  // the least and the largest code of a scale
    bool table = false;
    bool odd = false;  // whether codes of scales are odd

    static KGrid of(int bits);  // 2 to 6
    static KGrid iq4_xs() { return {4, 32, false, -32, 31, true}; }
    Index groups() const { return superblock_size / group_size; }
};

// Of group g in superblock k the scale is d[k]·scale_codes[g] and the bias −dmin[k]·min_codes[g].
// Symmetric grids have no mins, and neither dmin nor min_codes.
struct SuperblocksView {
    MatrixView<Eigen::half> d;            // [out, in / 256]
    MatrixView<std::int8_t> scale_codes;  // [out, groups]
    MatrixView<Eigen::half> dmin;         // [out, in / 256]
    MatrixView<std::uint8_t> min_codes;   // [out, groups]
};

// The superblocks nearest to scales and biases [out, groups] that were fitted group by group:
// those of the least Σ cost (value − d·code)², the cost of a group being the sum of `importance`
// [in] over its channels. Biases of symmetric grids are not read. False if float16 cannot hold a
// scale.
bool fit_superblocks(ConstMatrixView<float> scales, ConstMatrixView<float> biases,
                     ConstVectorView<float> importance, const KGrid& grid, SuperblocksView result);

// The scales and biases [out, groups] with the least Σ importance (weight − decoded)² for codes
// that are given, weight and codes [out, in] and importance [in]; of symmetric grids the offsets
// are the zeros. Where all codes of a group are the same, which says nothing, the scale is NaN.
void closed_form(ConstMatrixView<float> weight, ConstMatrixView<std::uint8_t> codes,
                 ConstVectorView<float> importance, const KGrid& grid, const float* points,
                 MatrixView<float> scales, MatrixView<float> offsets);

}  // namespace bitwright
