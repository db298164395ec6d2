#include "bindings/arrays.hpp"
#include "bindings/bind.hpp"
#include "linalg/bfloat16_product.hpp"
#include "linalg/cholesky.hpp"
#include "linalg/gram.hpp"
#include "linalg/inner_product.hpp"
#include "linalg/inverse_factor.hpp"
#include "linalg/quadratic_form.hpp"
#include "linalg/threads.hpp"

namespace bitwright {

void bind_linalg(py::module_& module) {
    module.def("blas", [] { return std::string(blas_name()); });
    module.def("num_threads", &num_threads);
    module.def(
        "set_num_threads",
        [](int threads) {
            if (threads < 1 || threads > 1024)
                throw py::value_error("threads: expected 1 to 1024, got " +
                                      std::to_string(threads));
            set_num_threads(threads);
        },
        py::arg("threads"));

    module.def(
        "accumulate_gram",
        [](const py::object& activations, const py::object& out) {
            const auto x = matrix<float>(activations, "activations");
            auto g = writable_matrix<float>(out, "out", x.cols(), x.cols());
            const py::gil_scoped_release release;
            if (x.size() != 0) accumulate_gram(x, g);
        },
        py::arg("activations"), py::arg("out"));

    module.def("multiplies_bfloat16", &multiplies_bfloat16);
    module.def(
        "bfloat16_product",
        [](const py::object& left, bool left_rows, const py::object& right, bool right_rows,
           const py::object& out, bool accumulate, bool lower, bool plain) {
            const auto of_left = matrix<float>(left, "left");
            const auto l = left_rows ? ProductFactor<float>::rows_of(of_left)
                                     : ProductFactor<float>::columns_of(of_left);
            const Index rows = right_rows ? -1 : l.depth, columns = right_rows ? l.depth : -1;
            with_weight(
                right, "right",
                [&]<typename Scalar>(ConstMatrixView<Scalar> of_right) {
                    const auto r = right_rows ? ProductFactor<Scalar>::rows_of(of_right)
                                              : ProductFactor<Scalar>::columns_of(of_right);
                    auto product =
                        writable_matrix<float>(out, "out", l.lanes, lower ? l.lanes : r.lanes);
                    const py::gil_scoped_release release;
                    bfloat16_product(l, r, accumulate, lower ? Part::lower : Part::all, plain,
                                     product);
                },
                rows, columns);
        },
        py::arg("left"), py::arg("left_rows"), py::arg("right"), py::arg("right_rows"),
        py::arg("out"), py::arg("accumulate"), py::arg("lower") = false, py::arg("plain") = false);

    module.def(
        "inner_product",
        [](const py::object& a, const py::object& b) {
            const auto left = matrix<float>(a, "a");
            const auto right = matrix<float>(b, "b", left.rows(), left.cols());
            const py::gil_scoped_release release;
            return inner_product(left, right);
        },
        py::arg("a"), py::arg("b"));

    module.def(
        "mirror_lower",
        [](const py::object& square) {
            auto view = writable_matrix<float>(square, "matrix");
            require_extent(py::reinterpret_borrow<py::array>(square), "matrix", 1, view.rows());
            const py::gil_scoped_release release;
            mirror_lower(view);
        },
        py::arg("matrix"));

    module.def(
        "inverse_factor",
        [](const py::object& gram, const py::object& order, float damping) -> py::object {
            const auto g = matrix<float>(gram, "gram");
            require_extent(py::reinterpret_borrow<py::array>(gram), "gram", 1, g.rows());
            const auto columns = vector<std::int32_t>(order, "order", g.rows());
            if (!are_indices(columns, g.rows()))
                throw py::value_error("order: expected a permutation of the gram's columns");
            auto result = new_matrix<float>(g.rows(), g.cols());
            auto upper = view(result);
            bool definite = false;
            {
                const py::gil_scoped_release release;
                definite = inverse_factor(g, columns, damping, upper);
            }
            return definite ? py::object(result) : py::none();
        },
        py::arg("gram"), py::arg("order"), py::arg("damping"));

    module.def(
        "cholesky_factor",
        [](const py::object& square) {
            auto a = writable_matrix<float>(square, "matrix");
            require_extent(py::reinterpret_borrow<py::array>(square), "matrix", 1, a.rows());
            const py::gil_scoped_release release;
            return cholesky_factor(a);
        },
        py::arg("matrix"));

    module.def(
        "cholesky_solve",
        [](const py::object& factor, const py::object& rows) {
            const auto a = matrix<float>(factor, "factor");
            require_extent(py::reinterpret_borrow<py::array>(factor), "factor", 1, a.rows());
            auto x = writable_matrix<float>(rows, "rows", -1, a.cols());
            const py::gil_scoped_release release;
            cholesky_solve(a, x);
        },
        py::arg("factor"), py::arg("rows"));

    module.def(
        "row_quadratic_forms",
        [](const py::object& change, const py::object& gram) {
            const auto d = matrix<float>(change, "change");
            const auto g = matrix<float>(gram, "gram", d.cols(), d.cols());
            py::array_t<double> forms(d.rows());
            VectorView<double> target(forms.mutable_data(), d.rows());
            {
                const py::gil_scoped_release release;
                row_quadratic_forms(d, g, target);
            }
            return forms;
        },
        py::arg("change"), py::arg("gram"));
}

}  // namespace bitwright
