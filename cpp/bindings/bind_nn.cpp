#include "bindings/arrays.hpp"
#include "bindings/bind.hpp"
#include "nn/attention.hpp"
#include "nn/elementwise.hpp"
#include "nn/linear.hpp"
#include "nn/losses.hpp"
#include "nn/recurrence.hpp"

namespace bitwright {
namespace {

void require_positive(Index value, const char* name) {
    if (value < 1)
        throw py::value_error(std::string(name) + ": expected at least 1, got " +
                              std::to_string(value));
}

// Calls body with a map over a weight: in the scalar of the states, or for float in 16 bits.
template <typename Scalar, typename Body>
void with_stored(const py::object& weight, Index rows, Index columns, const Body& body) {
    if constexpr (std::is_same_v<Scalar, float>)
        with_weight(weight, "weight", body, rows, columns);
    else
        body(matrix<Scalar>(weight, "weight", rows, columns));
}

Activation activation_named(const std::string& name) {
    if (name == "silu") return Activation::silu;
    if (name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
    if (name == "gelu") return Activation::gelu;
    if (name == "relu") return Activation::relu;
    if (name == "relu2") return Activation::relu_squared;
    if (name == "sigmoid") return Activation::sigmoid;
    throw py::value_error(
        "activation: expected silu, gelu_pytorch_tanh, gelu, relu, relu2 or sigmoid, got " + name);
}

void bind_linear(py::module_& module) {
    module.def(
        "linear",
        [](const py::object& input, const py::object& weight, const py::object& bias,
           const py::object& out, bool accumulate) {
            with_floats(input, [&]<typename Scalar>(Scalar) {
                const auto x = matrix<Scalar>(input, "input");
                with_stored<Scalar>(weight, -1, x.cols(), [&](auto w) {
                    const Scalar* b = optional_vector<Scalar>(bias, "bias", w.rows());
                    auto y = writable_matrix<Scalar>(out, "out", x.rows(), w.rows());
                    const py::gil_scoped_release release;
                    linear(x, w, b, accumulate, y);
                });
            });
        },
        py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("out"),
        py::arg("accumulate"));
    module.def(
        "linear_backward_input",
        [](const py::object& gradient, const py::object& weight, const py::object& out,
           bool accumulate) {
            with_floats(gradient, [&]<typename Scalar>(Scalar) {
                const auto g = matrix<Scalar>(gradient, "gradient");
                with_stored<Scalar>(weight, g.cols(), -1, [&](auto w) {
                    auto x = writable_matrix<Scalar>(out, "out", g.rows(), w.cols());
                    const py::gil_scoped_release release;
                    linear_backward_input(g, w, accumulate, x);
                });
            });
        },
        py::arg("gradient"), py::arg("weight"), py::arg("out"), py::arg("accumulate"));
    module.def(
        "linear_backward_weight",
        [](const py::object& gradient, const py::object& input, const py::object& out) {
            with_floats(gradient, [&]<typename Scalar>(Scalar) {
                const auto g = matrix<Scalar>(gradient, "gradient");
                const auto x = matrix<Scalar>(input, "input", g.rows());
                auto w = writable_matrix<Scalar>(out, "out", g.cols(), x.cols());
                const py::gil_scoped_release release;
                linear_backward_weight(g, x, w);
            });
        },
        py::arg("gradient"), py::arg("input"), py::arg("out"));
    module.def(
        "linear_backward_groups",
        [](const py::object& gradient, const py::object& input, const py::object& codes,
           const py::object& groups, const py::object& scale_gradients,
           const py::object& bias_gradients, const py::object& points) {
            const float* of_codes = optional_vector<float>(points, "points", every_code);
            with_floats(gradient, [&]<typename Scalar>(Scalar) {
                const auto g = matrix<Scalar>(gradient, "gradient");
                const auto x = matrix<Scalar>(input, "input", g.rows());
                const auto c = matrix<std::uint8_t>(codes, "codes", g.cols(), x.cols());
                const auto of = vector<std::int32_t>(groups, "groups", x.cols());
                auto scales = writable_matrix<Scalar>(scale_gradients, "scale_gradients", g.cols());
                auto biases = writable_matrix<Scalar>(bias_gradients, "bias_gradients", g.cols(),
                                                      scales.cols());
                if (!are_indices(of, scales.cols()))
                    throw py::value_error("groups: expected indices from 0 to " +
                                          std::to_string(scales.cols() - 1));
                const py::gil_scoped_release release;
                linear_backward_groups(g, x, c, of, of_codes, scales, biases);
            });
        },
        py::arg("gradient"), py::arg("input"), py::arg("codes"), py::arg("groups"),
        py::arg("scale_gradients"), py::arg("bias_gradients"), py::arg("points") = py::none());
}

void bind_norms(py::module_& module) {
    module.def(
        "rms_norm",
        [](const py::object& input, const py::object& weight, double epsilon,
           const py::object& out) {
            with_floats(input, [&]<typename Scalar>(Scalar) {
                const auto x = matrix<Scalar>(input, "input");
                const auto w = vector<Scalar>(weight, "weight", x.cols());
                auto y = writable_matrix<Scalar>(out, "out", x.rows(), x.cols());
                const py::gil_scoped_release release;
                rms_norm(x, w, epsilon, y);
            });
        },
        py::arg("input"), py::arg("weight"), py::arg("epsilon"), py::arg("out"));
    module.def(
        "layer_norm",
        [](const py::object& input, const py::object& weight, const py::object& bias,
           double epsilon, const py::object& out) {
            with_floats(input, [&]<typename Scalar>(Scalar) {
                const auto x = matrix<Scalar>(input, "input");
                const auto w = vector<Scalar>(weight, "weight", x.cols());
                const auto b = vector<Scalar>(bias, "bias", x.cols());
                auto y = writable_matrix<Scalar>(out, "out", x.rows(), x.cols());
                const py::gil_scoped_release release;
                layer_norm(x, w, b, epsilon, y);
            });
        },
        py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("epsilon"), py::arg("out"));
    const auto backward = [&module](const char* name, auto kernel) {
        module.def(
            name,
            [kernel](const py::object& input, const py::object& weight, double epsilon,
                     const py::object& gradient, const py::object& out,
                     const py::object& weight_gradient) {
                with_floats(input, [&]<typename Scalar>(Scalar) {
                    const auto x = matrix<Scalar>(input, "input");
                    const auto w = vector<Scalar>(weight, "weight", x.cols());
                    const auto g = matrix<Scalar>(gradient, "gradient", x.rows(), x.cols());
                    auto y = writable_matrix<Scalar>(out, "out", x.rows(), x.cols());
                    Scalar* sum = optional_writable_vector<Scalar>(weight_gradient,
                                                                   "weight_gradient", x.cols());
                    const py::gil_scoped_release release;
                    kernel(x, w, epsilon, g, y, sum);
                });
            },
            py::arg("input"), py::arg("weight"), py::arg("epsilon"), py::arg("gradient"),
            py::arg("out"), py::arg("weight_gradient") = py::none());
    };
    backward("rms_norm_backward", [](auto... arguments) { rms_norm_backward(arguments...); });
    backward("layer_norm_backward", [](auto... arguments) { layer_norm_backward(arguments...); });
}

template <typename Scalar>
struct AttentionInputs {
    ConstMatrixView<Scalar> query, key, value;
    AttentionRule rule;

    AttentionInputs(const py::object& queries, const py::object& keys, const py::object& values,
                    const AttentionRule& given)
        : query(matrix<Scalar>(queries, "query")),
          key(nullptr, 0, 0),
          value(nullptr, 0, 0),
          rule(given) {
        require_positive(rule.length, "length");
        require_positive(rule.heads, "heads");
        require_positive(rule.key_heads, "key_heads");
        if (rule.window < 0 || rule.past < 0 || !(rule.softcap >= 0.0))
            throw py::value_error("window, past and softcap: expected 0 or more");
        if (rule.heads % rule.key_heads != 0 || query.cols() % rule.heads != 0 ||
            query.rows() % rule.length != 0)
            throw py::value_error(
                "query: key_heads must divide heads, heads the columns and length the rows");
        const Index seen = query.rows() / rule.length * rule.seen();
        new (&key) ConstMatrixView<Scalar>(
            matrix<Scalar>(keys, "key", seen, query.cols() / rule.heads * rule.key_heads));
        new (&value) ConstMatrixView<Scalar>(matrix<Scalar>(values, "value", seen));
        if (value.cols() % rule.key_heads != 0)
            throw py::value_error("value: key_heads must divide its columns");
    }

    Index output_columns() const { return value.cols() / rule.key_heads * rule.heads; }
};

void bind_attention(py::module_& module) {
    module.def(
        "rotate",
        [](const py::object& states, const py::object& cosines, const py::object& sines,
           Index heads, Index first, bool interleaved, bool backward) {
            require_positive(heads, "heads");
            with_floats(states, [&]<typename Scalar>(Scalar) {
                const auto c = matrix<Scalar>(cosines, "cosines");
                const auto s = matrix<Scalar>(sines, "sines", c.rows(), c.cols());
                auto x = writable_matrix<Scalar>(states, "states");
                if (x.cols() % heads != 0 || first < 0 || first + 2 * c.cols() > x.cols() / heads)
                    throw py::value_error("states: " + std::to_string(heads) + " heads of " +
                                          std::to_string(first + 2 * c.cols()) +
                                          " channels or more do not fit in " +
                                          std::to_string(x.cols()) + " columns");
                if (c.rows() == 0 || x.rows() % c.rows() != 0)
                    throw py::value_error("states: " + std::to_string(x.rows()) +
                                          " rows are not whole samples of " +
                                          std::to_string(c.rows()) + " positions");
                const py::gil_scoped_release release;
                rotate(x, c, s, heads, first, interleaved, backward);
            });
        },
        py::arg("states"), py::arg("cosines"), py::arg("sines"), py::arg("heads"),
        py::arg("first") = 0, py::arg("interleaved") = false, py::arg("backward") = false);
    module.def(
        "attention",
        [](const py::object& query, const py::object& key, const py::object& value, Index length,
           Index heads, Index key_heads, double scale, const py::object& out, Index window,
           double softcap, const py::object& sinks, Index past) {
            with_floats(query, [&]<typename Scalar>(Scalar) {
                const AttentionInputs<Scalar> from(
                    query, key, value, {length, heads, key_heads, window, scale, softcap, past});
                const Scalar* s = optional_vector<Scalar>(sinks, "sinks", heads);
                auto y =
                    writable_matrix<Scalar>(out, "out", from.query.rows(), from.output_columns());
                const py::gil_scoped_release release;
                attention(from.query, from.key, from.value, from.rule, s, y);
            });
        },
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("length"), py::arg("heads"),
        py::arg("key_heads"), py::arg("scale"), py::arg("out"), py::arg("window") = 0,
        py::arg("softcap") = 0.0, py::arg("sinks") = py::none(), py::arg("past") = 0);
    module.def(
        "attention_backward",
        [](const py::object& query, const py::object& key, const py::object& value, Index length,
           Index heads, Index key_heads, double scale, const py::object& gradient,
           const py::object& query_gradient, const py::object& key_gradient,
           const py::object& value_gradient, Index window, double softcap,
           const py::object& sinks) {
            with_floats(query, [&]<typename Scalar>(Scalar) {
                const AttentionInputs<Scalar> from(
                    query, key, value, {length, heads, key_heads, window, scale, softcap});
                const Index rows = from.query.rows();
                const Scalar* s = optional_vector<Scalar>(sinks, "sinks", heads);
                const auto g = matrix<Scalar>(gradient, "gradient", rows, from.output_columns());
                auto dq = writable_matrix<Scalar>(query_gradient, "query_gradient", rows,
                                                  from.query.cols());
                auto dk =
                    writable_matrix<Scalar>(key_gradient, "key_gradient", rows, from.key.cols());
                auto dv = writable_matrix<Scalar>(value_gradient, "value_gradient", rows,
                                                  from.value.cols());
                const py::gil_scoped_release release;
                attention_backward(from.query, from.key, from.value, from.rule, s, g, dq, dk, dv);
            });
        },
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("length"), py::arg("heads"),
        py::arg("key_heads"), py::arg("scale"), py::arg("gradient"), py::arg("query_gradient"),
        py::arg("key_gradient"), py::arg("value_gradient"), py::arg("window") = 0,
        py::arg("softcap") = 0.0, py::arg("sinks") = py::none());
}

void bind_activations(py::module_& module) {
    module.def(
        "activate",
        [](const py::object& states, const std::string& activation) {
            const Activation kind = activation_named(activation);
            with_floats(states, [&]<typename Scalar>(Scalar) {
                auto x = writable_matrix<Scalar>(states, "states");
                const py::gil_scoped_release release;
                activate(x, kind);
            });
        },
        py::arg("states"), py::arg("activation"));
    module.def(
        "activate_backward",
        [](const py::object& states, const std::string& activation, const py::object& gradient) {
            const Activation kind = activation_named(activation);
            with_floats(states, [&]<typename Scalar>(Scalar) {
                const auto x = matrix<Scalar>(states, "states");
                auto g = writable_matrix<Scalar>(gradient, "gradient", x.rows(), x.cols());
                const py::gil_scoped_release release;
                activate_backward(x, kind, g);
            });
        },
        py::arg("states"), py::arg("activation"), py::arg("gradient"));
    module.def(
        "activate_multiply",
        [](const py::object& gate, const py::object& up, const std::string& activation) {
            const Activation kind = activation_named(activation);
            with_floats(gate, [&]<typename Scalar>(Scalar) {
                auto g = writable_matrix<Scalar>(gate, "gate");
                const auto u = matrix<Scalar>(up, "up", g.rows(), g.cols());
                const py::gil_scoped_release release;
                activate_multiply(g, u, kind);
            });
        },
        py::arg("gate"), py::arg("up"), py::arg("activation"));
    module.def(
        "activate_multiply_backward",
        [](const py::object& gate, const py::object& up, const std::string& activation,
           const py::object& gradient, const py::object& up_gradient) {
            const Activation kind = activation_named(activation);
            with_floats(gate, [&]<typename Scalar>(Scalar) {
                const auto g = matrix<Scalar>(gate, "gate");
                const auto u = matrix<Scalar>(up, "up", g.rows(), g.cols());
                auto dg = writable_matrix<Scalar>(gradient, "gradient", g.rows(), g.cols());
                auto du = writable_matrix<Scalar>(up_gradient, "up_gradient", g.rows(), g.cols());
                const py::gil_scoped_release release;
                activate_multiply_backward(g, u, kind, dg, du);
            });
        },
        py::arg("gate"), py::arg("up"), py::arg("activation"), py::arg("gradient"),
        py::arg("up_gradient"));
}

template <typename Scalar>
struct RecurrenceInputs {
    ConstMatrixView<Scalar> query, key, value, decay, strength;
    RecurrenceRule rule;

    static RecurrenceRule checked(const RecurrenceRule& rule) {
        require_positive(rule.length, "length");
        require_positive(rule.heads, "heads");
        require_positive(rule.key_heads, "key_heads");
        if (rule.heads % rule.key_heads != 0)
            throw py::value_error("heads: expected a multiple of key_heads");
        return rule;
    }

    RecurrenceInputs(const py::object& queries, const py::object& keys, const py::object& values,
                     const py::object& decays, const py::object& strengths,
                     const RecurrenceRule& given)
        : query(matrix<Scalar>(queries, "query")),
          key(matrix<Scalar>(keys, "key", query.rows(), query.cols())),
          value(matrix<Scalar>(values, "value", query.rows())),
          decay(matrix<Scalar>(decays, "decay", query.rows(), given.heads)),
          strength(matrix<Scalar>(strengths, "strength", query.rows(), given.heads)),
          rule(checked(given)) {
        if (query.cols() % rule.key_heads != 0 || value.cols() % rule.heads != 0 ||
            query.rows() % rule.length != 0)
            throw py::value_error(
                "query and value: heads must divide the columns and length the rows");
    }
};

void bind_recurrence(py::module_& module) {
    module.def(
        "recurrence",
        [](const py::object& query, const py::object& key, const py::object& value,
           const py::object& decay, const py::object& strength, Index length, Index heads,
           Index key_heads, bool corrects, const py::object& out, const py::object& states) {
            with_floats(query, [&]<typename Scalar>(Scalar) {
                const RecurrenceInputs<Scalar> from(query, key, value, decay, strength,
                                                    {length, heads, key_heads});
                auto y = writable_matrix<Scalar>(out, "out", from.value.rows(), from.value.cols());
                Scalar* kept =
                    states.is_none()
                        ? nullptr
                        : writable_matrix<Scalar>(
                              states, "states", from.query.rows() / length * heads,
                              from.query.cols() / key_heads * (from.value.cols() / heads))
                              .data();
                const py::gil_scoped_release release;
                recurrence(from.query, from.key, from.value, from.decay, from.strength, from.rule,
                           corrects, kept, y);
            });
        },
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("decay"), py::arg("strength"),
        py::arg("length"), py::arg("heads"), py::arg("key_heads"), py::arg("corrects"),
        py::arg("out"), py::arg("states") = py::none());
    module.def(
        "recurrence_backward",
        [](const py::object& query, const py::object& key, const py::object& value,
           const py::object& decay, const py::object& strength, Index length, Index heads,
           Index key_heads, bool corrects, const py::object& gradient,
           const py::object& query_gradient, const py::object& key_gradient,
           const py::object& value_gradient, const py::object& decay_gradient,
           const py::object& strength_gradient) {
            with_floats(query, [&]<typename Scalar>(Scalar) {
                const RecurrenceInputs<Scalar> from(query, key, value, decay, strength,
                                                    {length, heads, key_heads});
                const Index rows = from.query.rows(), wide = from.query.cols();
                const auto g = matrix<Scalar>(gradient, "gradient", rows, from.value.cols());
                RecurrenceGradients<Scalar> to{
                    writable_matrix<Scalar>(query_gradient, "query_gradient", rows, wide),
                    writable_matrix<Scalar>(key_gradient, "key_gradient", rows, wide),
                    writable_matrix<Scalar>(value_gradient, "value_gradient", rows,
                                            from.value.cols()),
                    writable_matrix<Scalar>(decay_gradient, "decay_gradient", rows, heads),
                    writable_matrix<Scalar>(strength_gradient, "strength_gradient", rows, heads)};
                const py::gil_scoped_release release;
                recurrence_backward(from.query, from.key, from.value, from.decay, from.strength,
                                    from.rule, corrects, g, to);
            });
        },
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("decay"), py::arg("strength"),
        py::arg("length"), py::arg("heads"), py::arg("key_heads"), py::arg("corrects"),
        py::arg("gradient"), py::arg("query_gradient"), py::arg("key_gradient"),
        py::arg("value_gradient"), py::arg("decay_gradient"), py::arg("strength_gradient"));
    module.def(
        "convolve",
        [](const py::object& states, const py::object& weight, const py::object& bias, Index length,
           const py::object& out) {
            require_positive(length, "length");
            with_floats(states, [&]<typename Scalar>(Scalar) {
                const auto x = matrix<Scalar>(states, "states");
                const auto w = matrix<Scalar>(weight, "weight", x.cols());
                const Scalar* b = optional_vector<Scalar>(bias, "bias", x.cols());
                auto y = writable_matrix<Scalar>(out, "out", x.rows(), x.cols());
                if (x.rows() % length != 0)
                    throw py::value_error("states: length must divide the rows");
                const py::gil_scoped_release release;
                convolve(x, w, b, length, y);
            });
        },
        py::arg("states"), py::arg("weight"), py::arg("bias"), py::arg("length"), py::arg("out"));
    module.def(
        "convolve_backward",
        [](const py::object& gradient, const py::object& weight, Index length,
           const py::object& out) {
            require_positive(length, "length");
            with_floats(gradient, [&]<typename Scalar>(Scalar) {
                const auto g = matrix<Scalar>(gradient, "gradient");
                const auto w = matrix<Scalar>(weight, "weight", g.cols());
                auto y = writable_matrix<Scalar>(out, "out", g.rows(), g.cols());
                if (g.rows() % length != 0)
                    throw py::value_error("gradient: length must divide the rows");
                const py::gil_scoped_release release;
                convolve_backward(g, w, length, y);
            });
        },
        py::arg("gradient"), py::arg("weight"), py::arg("length"), py::arg("out"));
}

void bind_clamped_swiglu(py::module_& module) {
    module.def(
        "clamped_swiglu",
        [](const py::object& gate, const py::object& up, double alpha, double limit) {
            with_floats(gate, [&]<typename Scalar>(Scalar) {
                auto g = writable_matrix<Scalar>(gate, "gate");
                const auto u = matrix<Scalar>(up, "up", g.rows(), g.cols());
                const py::gil_scoped_release release;
                clamped_swiglu(g, u, alpha, limit);
            });
        },
        py::arg("gate"), py::arg("up"), py::arg("alpha"), py::arg("limit"));
    module.def(
        "clamped_swiglu_backward",
        [](const py::object& gate, const py::object& up, double alpha, double limit,
           const py::object& gradient, const py::object& up_gradient) {
            with_floats(gate, [&]<typename Scalar>(Scalar) {
                const auto g = matrix<Scalar>(gate, "gate");
                const auto u = matrix<Scalar>(up, "up", g.rows(), g.cols());
                auto dg = writable_matrix<Scalar>(gradient, "gradient", g.rows(), g.cols());
                auto du = writable_matrix<Scalar>(up_gradient, "up_gradient", g.rows(), g.cols());
                const py::gil_scoped_release release;
                clamped_swiglu_backward(g, u, alpha, limit, dg, du);
            });
        },
        py::arg("gate"), py::arg("up"), py::arg("alpha"), py::arg("limit"), py::arg("gradient"),
        py::arg("up_gradient"));
}

void require_cap(double divisor, double cap) {
    if (!(divisor > 0.0) || !(cap >= 0.0))
        throw py::value_error("divisor and cap: expected more than 0, and 0 or more");
}

Loss loss_named(const std::string& name) {
    if (name == "kl") return Loss::kl;
    if (name == "reverse_kl") return Loss::reverse_kl;
    if (name == "js") return Loss::js;
    if (name == "cross_entropy") return Loss::cross_entropy;
    if (name == "logits_mse") return Loss::logits_mse;
    throw py::value_error("loss: expected kl, reverse_kl, js, cross_entropy or logits_mse, got " +
                          name);
}

void bind_distillation(py::module_& module) {
    module.def(
        "cap_logits",
        [](const py::object& logits, double divisor, double cap) {
            require_cap(divisor, cap);
            with_floats(logits, [&]<typename Scalar>(Scalar) {
                auto l = writable_matrix<Scalar>(logits, "logits");
                const py::gil_scoped_release release;
                cap_logits(l, divisor, cap);
            });
        },
        py::arg("logits"), py::arg("divisor"), py::arg("cap"));
    module.def(
        "cap_logits_backward",
        [](const py::object& capped, double divisor, double cap, const py::object& gradient) {
            require_cap(divisor, cap);
            with_floats(capped, [&]<typename Scalar>(Scalar) {
                const auto l = matrix<Scalar>(capped, "capped");
                auto g = writable_matrix<Scalar>(gradient, "gradient", l.rows(), l.cols());
                const py::gil_scoped_release release;
                cap_logits_backward(l, divisor, cap, g);
            });
        },
        py::arg("capped"), py::arg("divisor"), py::arg("cap"), py::arg("gradient"));
    module.def(
        "top_tokens",
        [](const py::object& logits, double temperature, const py::object& ids,
           const py::object& log_probabilities, const py::object& rest) {
            if (!(temperature > 0.0)) throw py::value_error("temperature: expected more than 0");
            with_floats(logits, [&]<typename Scalar>(Scalar) {
                const auto l = matrix<Scalar>(logits, "logits");
                auto i = writable_matrix<std::int32_t>(ids, "ids", l.rows());
                if (i.cols() < 1 || i.cols() > l.cols())
                    throw py::value_error("ids: expected 1 to " + std::to_string(l.cols()) +
                                          " columns, got " + std::to_string(i.cols()));
                auto p = writable_matrix<Scalar>(log_probabilities, "log_probabilities", l.rows(),
                                                 i.cols());
                auto r = writable_vector<Scalar>(rest, "rest", l.rows());
                const py::gil_scoped_release release;
                top_tokens(l, temperature, i, p, r);
            });
        },
        py::arg("logits"), py::arg("temperature"), py::arg("ids"), py::arg("log_probabilities"),
        py::arg("rest"));
    module.def(
        "distillation_loss",
        [](const py::object& logits, const py::object& ids, const py::object& log_probabilities,
           const py::object& rest, const py::object& next, const std::string& loss,
           double temperature, double factor, const py::object& gradient) {
            const Loss kind = loss_named(loss);
            if (!(temperature > 0.0)) throw py::value_error("temperature: expected more than 0");
            return with_floats(logits, [&]<typename Scalar>(Scalar) {
                const auto l = matrix<Scalar>(logits, "logits");
                const auto i = matrix<std::int32_t>(ids, "ids", l.rows());
                const TopTokens<Scalar> teacher{
                    i, matrix<Scalar>(log_probabilities, "log_probabilities", l.rows(), i.cols()),
                    vector<Scalar>(rest, "rest", l.rows())};
                const auto n = vector<std::int32_t>(next, "next", l.rows());
                if (i.cols() < 1 || i.cols() > l.cols() || !are_indices(i, l.cols()) ||
                    (n.size() > 0 && n.maxCoeff() >= l.cols()))
                    throw py::value_error("ids and next: expected token ids from 0 to " +
                                          std::to_string(l.cols() - 1));
                Scalar* g =
                    gradient.is_none()
                        ? nullptr
                        : writable_matrix<Scalar>(gradient, "gradient", l.rows(), l.cols()).data();
                py::array_t<double> losses(l.rows());
                VectorView<double> result(losses.mutable_data(), l.rows());
                {
                    const py::gil_scoped_release release;
                    distillation_loss(l, teacher, n, kind, temperature, factor, result, g);
                }
                return losses;
            });
        },
        py::arg("logits"), py::arg("ids"), py::arg("log_probabilities"), py::arg("rest"),
        py::arg("next"), py::arg("loss"), py::arg("temperature"), py::arg("factor"),
        py::arg("gradient"));
}

void bind_losses(py::module_& module) {
    module.def(
        "cross_entropy",
        [](const py::object& logits, const py::object& targets) {
            const auto l = matrix<float>(logits, "logits");
            const auto t = vector<std::int32_t>(targets, "targets", l.rows());
            if (!are_indices(t, l.cols()))
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
        "draw_tokens",
        [](const py::object& logits, const py::object& uniform) {
            const auto l = matrix<float>(logits, "logits");
            const auto u = vector<double>(uniform, "uniform", l.rows());
            if (l.cols() == 0) throw py::value_error("logits: the vocabulary is empty");
            py::array_t<std::int32_t> ids(l.rows());
            VectorView<std::int32_t> result(ids.mutable_data(), l.rows());
            {
                const py::gil_scoped_release release;
                draw_tokens(l, u, result);
            }
            return ids;
        },
        py::arg("logits"), py::arg("uniform"));
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
    bind_linear(module);
    bind_norms(module);
    bind_attention(module);
    bind_activations(module);
    bind_clamped_swiglu(module);
    bind_recurrence(module);
    bind_losses(module);
    bind_distillation(module);
}

}  // namespace bitwright
