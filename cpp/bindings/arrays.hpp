// NumPy arrays as Eigen maps: no copies, no conversions, and an error that names the argument.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <type_traits>

#include "linalg/matrix.hpp"

namespace bitwright {

namespace py = pybind11;

template <typename Scalar>
constexpr const char* dtype_name = nullptr;
template <>
inline constexpr const char* dtype_name<float> = "float32";
template <>
inline constexpr const char* dtype_name<double> = "float64";
template <>
inline constexpr const char* dtype_name<Eigen::half> = "float16";
template <>
inline constexpr const char* dtype_name<Eigen::bfloat16> = "bfloat16";
template <>
inline constexpr const char* dtype_name<std::uint8_t> = "uint8";
template <>
inline constexpr const char* dtype_name<std::int8_t> = "int8";
template <>
inline constexpr const char* dtype_name<std::int32_t> = "int32";
template <>
inline constexpr const char* dtype_name<std::uint32_t> = "uint32";

inline std::string describe(const py::array& array) {
    return py::str(array.dtype()).cast<std::string>() + " of shape " +
           py::str(array.attr("shape")).cast<std::string>();
}

// An ndarray of `dimensions` axes whose elements lie one after another; the dtype is for the caller
// to check.
inline py::array contiguous(const py::object& object, const char* name, py::ssize_t dimensions,
                            bool writable = false) {
    const std::string label(name);
    if (!py::isinstance<py::array>(object))
        throw py::type_error(label + ": expected a NumPy array, got " +
                             py::str(py::type::of(object).attr("__name__")).cast<std::string>());
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (array.ndim() != dimensions)
        throw py::value_error(label + ": expected " + std::to_string(dimensions) +
                              (dimensions == 1 ? " axis" : " axes") + ", got " + describe(array));
    if (!(array.flags() & py::array::c_style))
        throw py::value_error(label + ": the array (" + describe(array) +
                              ") is not C-contiguous; pass numpy.ascontiguousarray(" + label + ")");
    if (!py::cast<bool>(array.attr("flags").attr("aligned")) ||
        !py::cast<bool>(array.dtype().attr("isnative")))
        throw py::value_error(label + ": the array is misaligned or of foreign byte order; pass " +
                              label + ".copy() in the native order");
    if (writable && !array.writeable())
        throw py::value_error(label + ": the array is read-only, but the result is written to it");
    return array;
}

// NumPy's own types are compared by number: asking for a name takes ten microseconds.
template <typename Scalar>
bool has_dtype(const py::array& array) {
    if constexpr (std::is_arithmetic_v<Scalar>)
        return py::isinstance<py::array_t<Scalar>>(array);
    else
        return py::str(array.dtype().attr("name")).cast<std::string>() == dtype_name<Scalar>;
}

template <typename Scalar>
void require_dtype(const py::array& array, const char* name) {
    if (!has_dtype<Scalar>(array))
        throw py::type_error(std::string(name) + ": expected dtype " + dtype_name<Scalar> +
                             ", got " + describe(array) + "; convert it with " + name +
                             ".astype(\"" + dtype_name<Scalar> + "\")");
}

inline void require_extent(const py::array& array, const char* name, int axis, Index expected) {
    if (expected >= 0 && array.shape(axis) != expected)
        throw py::value_error(std::string(name) + ": axis " + std::to_string(axis) + " must be " +
                              std::to_string(expected) + ", got " + describe(array));
}

// Extents of −1 are free.
template <typename Scalar>
ConstMatrixView<Scalar> matrix(const py::object& object, const char* name, Index rows = -1,
                               Index columns = -1) {
    const py::array array = contiguous(object, name, 2);
    require_dtype<Scalar>(array, name);
    require_extent(array, name, 0, rows);
    require_extent(array, name, 1, columns);
    return {static_cast<const Scalar*>(array.data()), array.shape(0), array.shape(1)};
}

template <typename Scalar>
MatrixView<Scalar> writable_matrix(const py::object& object, const char* name, Index rows = -1,
                                   Index columns = -1) {
    const auto view = matrix<Scalar>(object, name, rows, columns);
    contiguous(object, name, 2, true);
    return {const_cast<Scalar*>(view.data()), view.rows(), view.cols()};
}

template <typename Scalar>
ConstVectorView<Scalar> vector(const py::object& object, const char* name, Index size = -1) {
    const py::array array = contiguous(object, name, 1);
    require_dtype<Scalar>(array, name);
    require_extent(array, name, 0, size);
    return {static_cast<const Scalar*>(array.data()), array.shape(0)};
}

constexpr Index every_code = 256;  // what tables of points have an entry for

template <typename Scalar>
const Scalar* optional_vector(const py::object& object, const char* name, Index size) {
    return object.is_none() ? nullptr : vector<Scalar>(object, name, size).data();
}

template <typename Scalar>
VectorView<Scalar> writable_vector(const py::object& object, const char* name, Index size) {
    const auto view = vector<Scalar>(object, name, size);
    contiguous(object, name, 1, true);
    return {const_cast<Scalar*>(view.data()), view.size()};
}

template <typename Scalar>
Scalar* optional_writable_vector(const py::object& object, const char* name, Index size) {
    return object.is_none() ? nullptr : writable_vector<Scalar>(object, name, size).data();
}

// Calls body with a float or, where the array is float64, a double. The arrays themselves are
// checked by what body makes of them.
template <typename Body>
auto with_floats(const py::object& object, const Body& body) {
    if (py::isinstance<py::array>(object) &&
        has_dtype<double>(py::reinterpret_borrow<py::array>(object)))
        return body(double{});
    return body(float{});
}

// Whether all values are from 0 to count − 1.
template <typename Map>
bool are_indices(const Map& values, Index count) {
    return values.size() == 0 || (values.minCoeff() >= 0 && values.maxCoeff() < count);
}

template <typename Scalar>
py::array_t<Scalar> new_matrix(Index rows, Index columns) {
    return py::array_t<Scalar>({rows, columns});
}

inline py::array new_halves(Index rows, Index columns) {
    return {py::dtype("float16"), {rows, columns}};
}

inline MatrixView<Eigen::half> half_view(py::array& array) {
    return {static_cast<Eigen::half*>(array.mutable_data()), array.shape(0), array.shape(1)};
}

template <typename Scalar>
MatrixView<Scalar> view(py::array_t<Scalar>& array) {
    return {array.mutable_data(), array.shape(0), array.shape(1)};
}

// Calls body with a map over the float32, float16 or bfloat16 matrix; extents of −1 are free.
template <typename Body>
void with_weight(const py::object& object, const char* name, Body&& body, Index rows = -1,
                 Index columns = -1) {
    const py::array array = contiguous(object, name, 2);
    require_extent(array, name, 0, rows);
    require_extent(array, name, 1, columns);
    const auto call = [&]<typename Scalar>(Scalar) {
        if (!has_dtype<Scalar>(array)) return false;
        body(ConstMatrixView<Scalar>(static_cast<const Scalar*>(array.data()), array.shape(0),
                                     array.shape(1)));
        return true;
    };
    if (!call(float{}) && !call(Eigen::half{}) && !call(Eigen::bfloat16{}))
        throw py::type_error(std::string(name) +
                             ": expected dtype float32, float16 or bfloat16, got " +
                             describe(array));
}

}  // namespace bitwright
