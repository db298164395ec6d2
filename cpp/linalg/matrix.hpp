// The matrix types of every kernel: Eigen maps over somebody else's memory, NumPy's as a rule.
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

}  // namespace bitwright
