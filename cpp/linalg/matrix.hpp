// The matrix types of every kernel: Eigen maps over memory owned elsewhere, usually by NumPy.
#pragma once

#include <Eigen/Core>
#include <cstdint>

namespace bitwright {

using Eigen::Index;

template <typename Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <typename Scalar>
using MatrixView = Eigen::Map<Matrix<Scalar>>;
template <typename Scalar>
using ConstMatrixView = Eigen::Map<const Matrix<Scalar>>;

template <typename Scalar>
using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;
template <typename Scalar>
using VectorView = Eigen::Map<Vector<Scalar>>;
template <typename Scalar>
using ConstVectorView = Eigen::Map<const Vector<Scalar>>;

// Eigen computes what lies before the first aligned address of its target one by one, with other
// roundings of exp() and of fused multiply-adds than in whole registers, and NumPy aligns to 16
// bytes only. So whatever has more than one rounding is computed in rows of our own: equal inputs
// give equal bits wherever they lie.
template <typename Scalar>
using AlignedRow = Eigen::Array<Scalar, 1, Eigen::Dynamic>;

}  // namespace bitwright
