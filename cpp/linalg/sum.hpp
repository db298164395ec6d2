// Sums whose order depends on the number of terms alone, not on where they lie in memory.
#pragma once

#include "linalg/matrix.hpp"

namespace bitwright {

// Eigen begins the sum of what lies in memory at its first aligned address, so that the same
// numbers add up to other last bits elsewhere. What is computed has no address: its terms are taken
// from the first on, a register at a time. So memory is summed up as something computed, itself
// plus nothing.
template <typename Derived>
typename Derived::Scalar sum(const Eigen::DenseBase<Derived>& terms) {
    if constexpr ((Derived::Flags & Eigen::DirectAccessBit) == 0)
        return terms.sum();
    else
        return (terms.derived().array() + typename Derived::Scalar(0)).sum();
}

template <typename Derived>
typename Derived::Scalar mean(const Eigen::DenseBase<Derived>& terms) {
    return sum(terms) / static_cast<typename Derived::Scalar>(terms.size());
}

// The sum of 8 n terms in the order that NumPy takes up to 128 contiguous ones in: eight sums side
// by side, which are then added in pairs.
template <typename Scalar, int size>
Scalar pairwise_sum(const Eigen::Array<Scalar, size, 1>& terms) {
    static_assert(size % 8 == 0 && size <= 128);
    Eigen::Array<Scalar, 8, 1> sums = terms.template head<8>();
    for (int i = 8; i < size; i += 8) sums += terms.template segment<8>(i);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
           ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Σ a b in double.
template <typename Left, typename Right>
double dot(const Eigen::DenseBase<Left>& a, const Eigen::DenseBase<Right>& b) {
    return (a.derived().array().template cast<double>() *
            b.derived().array().template cast<double>())
        .sum();
}

// The sum of every column, in memory of its own, where Eigen has none to align to.
template <typename Derived>
Eigen::Matrix<typename Derived::Scalar, 1, Eigen::Dynamic> column_sums(
    const Eigen::DenseBase<Derived>& matrix) {
    return matrix.colwise().sum();
}

}  // namespace bitwright
