#include "bindings/arrays.hpp"
#include "bindings/bind.hpp"
#include "nn/attention.hpp"
#include "nn/elementwise.hpp"
#include "nn/linear.hpp"
#include "nn/losses.hpp"

namespace bitwright {
namespace {

void require_positive(Index value, const char* name) {
    if (value < 1)
        throw py::value_error(std::string(name) + ": expected at least 1, got " +
                              std::to_string(value));
}

Activation activation_named(const std::string& name) {
    if (name == "silu") return Activation::silu;
    if (name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
    if (name == "gelu") return Activation::gelu;
    if (name == "relu") return Activation::relu;
    throw py::value_error("activation: expected silu, gelu_pytorch_tanh, gelu or relu, got " +
                          name);
}

void bind_block(py::module_& module) {
    module.def(
        "linear",
        [](const py::object& input, const py::object& weight, const py::object& bias,
           const py::object& out, bool accumulate) {
            const auto x = matrix<float>(input, "input");
            const auto w = matrix<float>(weight, "weight", -1, x.cols());
            const float* b = optional_vector<float>(bias, "bias", w.rows());
            auto y = writable_matrix<float>(out, "out", x.rows(), w.rows());
            const py::gil_scoped_release release;
            linear(x, w, b, accumulate, y);
        },
        py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("out"),
        py::arg("accumulate"));

    module.def(
        "rms_norm",
        [](const py::object& input, const py::object& weight, float epsilon,
           const py::object& out) {
            const auto x = matrix<float>(input, "input");
            const auto w = vector<float>(weight, "weight", x.cols());
            auto y = writable_matrix<float>(out, "out", x.rows(), x.cols());
            const py::gil_scoped_release release;
            rms_norm(x, w, epsilon, y);
        },
        py::arg("input"), py::arg("weight"), py::arg("epsilon"), py::arg("out"));

    module.def(
        "layer_norm",
        [](const py::object& input, const py::object& weight, const py::object& bias, float epsilon,
           const py::object& out) {
            const auto x = matrix<float>(input, "input");
            const auto w = vector<float>(weight, "weight", x.cols());
            const auto b = vector<float>(bias, "bias", x.cols());
            auto y = writable_matrix<float>(out, "out", x.rows(), x.cols());
            const py::gil_scoped_release release;
            layer_norm(x, w, b, epsilon, y);
        },
        py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("epsilon"), py::arg("out"));

    module.def(
        "rotate",
        [](const py::object& states, const py::object& cosines, const py::object& sines,
           Index heads, Index first, bool interleaved) {
            require_positive(heads, "heads");
            const auto c = matrix<float>(cosines, "cosines");
            const auto s = matrix<float>(sines, "sines", c.rows(), c.cols());
            auto x = writable_matrix<float>(states, "states");
            if (x.cols() % heads != 0 || first < 0 || first + 2 * c.cols() > x.cols() / heads)
                throw py::value_error("states: " + std::to_string(heads) + " heads of " +
                                      std::to_string(first + 2 * c.cols()) +
                                      " channels or more do not fit in " +
                                      std::to_string(x.cols()) + " columns");
            if (c.rows() == 0 || x.rows() % c.rows() != 0)
                throw py::value_error("states: " + std::to_string(x.rows()) +
                                      " rows are not whole samples of " + std::to_string(c.rows()) +
                                      " positions");
            const py::gil_scoped_release release;
            rotate(x, c, s, heads, first, interleaved);
        },
        py::arg("states"), py::arg("cosines"), py::arg("sines"), py::arg("heads"),
        py::arg("first") = 0, py::arg("interleaved") = false);

    module.def(
        "attention",
        [](const py::object& query, const py::object& key, const py::object& value, Index length,
           Index heads, Index key_heads, float scale, const py::object& out, Index window,
           float softcap) {
            require_positive(length, "length");
            require_positive(heads, "heads");
            require_positive(key_heads, "key_heads");
            if (window < 0 || !(softcap >= 0.0f))
                throw py::value_error("window and softcap: expected 0 or more");
            const auto q = matrix<float>(query, "query");
            if (heads % key_heads != 0 || q.cols() % heads != 0 || q.rows() % length != 0)
                throw py::value_error(
                    "query: key_heads must divide heads, heads the columns and length the rows");
            const auto k = matrix<float>(key, "key", q.rows(), q.cols() / heads * key_heads);
            const auto v = matrix<float>(value, "value", k.rows());
            if (v.cols() % key_heads != 0)
                throw py::value_error("value: key_heads must divide its columns");
            auto y = writable_matrix<float>(out, "out", q.rows(), v.cols() / key_heads * heads);
            const py::gil_scoped_release release;
            attention(q, k, v, {length, heads, key_heads, window, scale, softcap}, y);
        },
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("length"), py::arg("heads"),
        py::arg("key_heads"), py::arg("scale"), py::arg("out"), py::arg("window") = 0,
        py::arg("softcap") = 0.0f);

    module.def(
        "activate",
        [](const py::object& states, const std::string& activation) {
            const Activation kind = activation_named(activation);
            auto x = writable_matrix<float>(states, "states");
            const py::gil_scoped_release release;
            activate(x, kind);
        },
        py::arg("states"), py::arg("activation"));

    module.def(
        "activate_multiply",
        [](const py::object& gate, const py::object& up, const std::string& activation) {
            const Activation kind = activation_named(activation);
            auto g = writable_matrix<float>(gate, "gate");
            const auto u = matrix<float>(up, "up", g.rows(), g.cols());
            const py::gil_scoped_release release;
            activate_multiply(g, u, kind);
        },
        py::arg("gate"), py::arg("up"), py::arg("activation"));
}

void bind_losses(py::module_& module) {
    module.def(
        "cross_entropy",
        [](const py::object& logits, const py::object& targets) {
            const auto l = matrix<float>(logits, "logits");
            const auto t = vector<std::int32_t>(targets, "targets", l.rows());
            if (t.size() > 0 && (t.minCoeff() < 0 || t.maxCoeff() >= l.cols()))
                throw py::value_error("targets: expected token ids from 0 to " +
                                      std::to_string(l.cols() - 1));
            py::array_t<double> losses(l.rows());
            VectorView<double> result(losses.mutable_data(), l.rows());
            {
                const py::gil_scoped_release release;
                cross_entropy(l, t, result);
            }
            return losses;
        },
        py::arg("logits"), py::arg("targets"));
    module.def(
        "kl_divergence",
        [](const py::object& reference, const py::object& logits) {
            const auto p = matrix<float>(reference, "reference");
            const auto q = matrix<float>(logits, "logits", p.rows(), p.cols());
            if (p.cols() == 0) throw py::value_error("reference: the vocabulary is empty");
            py::array_t<double> divergences(p.rows());
            VectorView<double> result(divergences.mutable_data(), p.rows());
            {
                const py::gil_scoped_release release;
                kl_divergence(p, q, result);
            }
            return divergences;
        },
        py::arg("reference"), py::arg("logits"));
}

}  // namespace

void bind_nn(py::module_& module) {
    bind_block(module);
    bind_losses(module);
}

}  // namespace bitwright
