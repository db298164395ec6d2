// Products of factors rounded to bfloat16, with sums in float32: twice as many per second as in
// float32 where the processor multiplies pairs of bfloat16 itself.
//
// What is computed is defined to the last bit, whoever computes it, and depends neither on the
// number of threads nor on the other rows and columns. Elements are rounded to nearest even. The
// depth is cut into blocks of 512; a block's sum starts at zero and takes the products pair by
// pair, of each pair the second one first, each by one fused multiply-add. Subnormal elements and
// subnormal sums count as zero there. The blocks' sums are added in order.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// Whether this processor has the instruction (AVX512-BF16), and this build uses it.
bool multiplies_bfloat16();

// A factor of a product: `lanes` rows (or columns) of the output, each a sum over `depth`. Of the
// elements in memory, those of one lane or those of one depth lie side by side.
template <typename Scalar>
struct ProductFactor {
    const Scalar* data;
    Index lanes, depth, stride;
    bool lane_by_lane;  // element (lane, i) at lane · stride + i, or else at i · stride + lane

    static ProductFactor rows_of(ConstMatrixView<Scalar> matrix) {
        return {matrix.data(), matrix.rows(), matrix.cols(), matrix.cols(), true};
    }
    static ProductFactor columns_of(ConstMatrixView<Scalar> matrix) {
        return {matrix.data(), matrix.cols(), matrix.rows(), matrix.cols(), false};
    }
};

enum class Part { all, lower };  // of the output that is computed: its lower triangle is enough

// output [left.lanes, right.lanes] = Σ left · right, or with `accumulate` +=. With `plain` the
// processor's own instruction is not used: the same bits, slowly.
template <typename Left, typename Right>
void bfloat16_product(ProductFactor<Left> left, ProductFactor<Right> right, bool accumulate,
                      Part part, bool plain, MatrixView<float> output);

}  // namespace bitwright
