#include "bindings/arrays.hpp"
#include "bindings/bind.hpp"
#include "quant/awq.hpp"
#include "quant/dequantize.hpp"
#include "quant/packing.hpp"
#include "quant/quantize.hpp"
#include "quant/refine.hpp"
#include "quant/slab.hpp"

namespace bitwright {
namespace {

GridRule rule_from(int bits, const std::string& grid, const std::string& scale_dtype, bool search) {
    if (bits < 2 || bits > 8)
        throw py::value_error("bits: expected 2 to 8, got " + std::to_string(bits));
    GridRule rule{Grid::affine, ScaleType::float32, bits, search};
    if (grid == "zero_point")
        rule.grid = Grid::zero_point;
    else if (grid == "symmetric")
        rule.grid = Grid::symmetric;
    else if (grid != "affine")
        throw py::value_error("grid: expected affine, zero_point or symmetric, got " + grid);
    if (scale_dtype == "float16")
        rule.scale_type = ScaleType::float16;
    else if (scale_dtype == "bfloat16")
        rule.scale_type = ScaleType::bfloat16;
    else if (scale_dtype != "float32")
        throw py::value_error("scale_dtype: expected float32, float16 or bfloat16, got " +
                              scale_dtype);
    return rule;
}

void check_group_size(Index group_size, Index in) {
    if (group_size < 1 || in % group_size != 0)
        throw py::value_error("group_size: " + std::to_string(group_size) +
                              " does not divide the " + std::to_string(in) +
                              " input channels of weight");
}

struct Result {
    py::array_t<std::uint8_t> codes;
    py::array_t<float> scales, offsets;
    Index group_size;

    Result(Index out, Index in, Index size)
        : codes(new_matrix<std::uint8_t>(out, in)), group_size(size) {
        check_group_size(size, in);
        scales = new_matrix<float>(out, in / size);
        offsets = new_matrix<float>(out, in / size);
    }

    QuantizedView quantized() { return {view(codes), view(scales), view(offsets), group_size}; }
};

void bind_methods(py::module_& module) {
    module.def(
        "quantize_rtn",
        [](const py::object& weight, const py::object& importance, int bits, Index group_size,
           const std::string& grid, const std::string& scale_dtype, bool search) {
            const GridRule rule = rule_from(bits, grid, scale_dtype, search);
            py::tuple outcome;
            with_weight(weight, "weight", [&](auto w) {
                const auto h = vector<float>(importance, "importance", w.cols());
                Result result(w.rows(), w.cols(), group_size);
                auto quantized = result.quantized();
                {
                    const py::gil_scoped_release release;
                    quantize_rtn(w, h, rule, quantized);
                }
                outcome = py::make_tuple(result.codes, result.scales, result.offsets);
            });
            return outcome;
        },
        py::arg("weight"), py::arg("importance"), py::arg("bits"), py::arg("group_size"),
        py::arg("grid"), py::arg("scale_dtype"), py::arg("search"));

    module.def(
        "quantize_gptq",
        [](const py::object& weight, const py::object& upper, const py::object& order,
           const py::object& importance, int bits, Index group_size, const std::string& grid,
           const std::string& scale_dtype, bool search, Index block_size, bool static_groups,
           const py::object& scales, const py::object& offsets) {
            const GridRule rule = rule_from(bits, grid, scale_dtype, search);
            if (block_size < 1) throw py::value_error("block_size: expected at least 1");
            py::tuple outcome;
            with_weight(weight, "weight", [&](auto w) {
                const Index in = w.cols();
                const auto u = matrix<float>(upper, "upper", in, in);
                const auto columns = vector<std::int32_t>(order, "order", in);
                if (in > 0 && (columns.minCoeff() < 0 || columns.maxCoeff() >= in))
                    throw py::value_error("order: expected a permutation of weight's columns");
                const auto h = vector<float>(importance, "importance", in);
                Result result(w.rows(), in, group_size);
                auto quantized = result.quantized();
                auto grids = static_groups ? GridsFrom::original : GridsFrom::progress;
                if (!scales.is_none()) {
                    grids = GridsFrom::result;
                    const Index groups = in / group_size;
                    quantized.scales = matrix<float>(scales, "scales", w.rows(), groups);
                    quantized.offsets = matrix<float>(offsets, "offsets", w.rows(), groups);
                }
                py::array_t<double> losses(in);
                VectorView<double> loss(losses.mutable_data(), in);
                {
                    const py::gil_scoped_release release;
                    quantize_gptq(w, u, columns, h, rule, block_size, grids, quantized, loss);
                }
                outcome = py::make_tuple(result.codes, result.scales, result.offsets, losses);
            });
            return outcome;
        },
        py::arg("weight"), py::arg("upper"), py::arg("order"), py::arg("importance"),
        py::arg("bits"), py::arg("group_size"), py::arg("grid"), py::arg("scale_dtype"),
        py::arg("search"), py::arg("block_size"), py::arg("static_groups"),
        py::arg("scales") = py::none(), py::arg("offsets") = py::none());
}

void bind_refine(py::module_& module) {
    module.def(
        "refine",
        [](const py::object& weight, const py::object& gram, const py::object& codes,
           const py::object& scales, const py::object& offsets, int bits, Index group_size,
           const std::string& grid, const std::string& scale_dtype, Index rounds, bool codes_only) {
            const GridRule rule = rule_from(bits, grid, scale_dtype, false);
            const auto w = matrix<float>(weight, "weight");
            const Index out = w.rows(), in = w.cols();
            const auto g = matrix<float>(gram, "gram", in, in);
            check_group_size(group_size, in);
            const QuantizedView result{
                writable_matrix<std::uint8_t>(codes, "codes", out, in),
                writable_matrix<float>(scales, "scales", out, in / group_size),
                writable_matrix<float>(offsets, "offsets", out, in / group_size), group_size};
            if (rounds < 0) throw py::value_error("rounds: expected 0 or more");
            py::array_t<double> objectives(rounds + 1);
            VectorView<double> values(objectives.mutable_data(), rounds + 1);
            {
                const py::gil_scoped_release release;
                refine(w, g, rule, rounds, codes_only, result, values);
            }
            return objectives;
        },
        py::arg("weight"), py::arg("gram"), py::arg("codes"), py::arg("scales"), py::arg("offsets"),
        py::arg("bits"), py::arg("group_size"), py::arg("grid"), py::arg("scale_dtype"),
        py::arg("rounds"), py::arg("codes_only") = false);
}

void bind_awq(py::module_& module) {
    module.def(
        "scaled_rounding_change",
        [](const py::object& weight, const py::object& scale, const py::object& importance,
           int bits, Index group_size, const std::string& grid, const std::string& scale_dtype,
           bool search, const py::object& out) {
            const GridRule rule = rule_from(bits, grid, scale_dtype, search);
            const auto w = matrix<float>(weight, "weight");
            check_group_size(group_size, w.cols());
            const auto s = vector<float>(scale, "scale", w.cols());
            const auto h = vector<float>(importance, "importance", w.cols());
            auto change = writable_matrix<float>(out, "out", w.rows(), w.cols());
            const py::gil_scoped_release release;
            scaled_rounding_change(w, s, h, rule, group_size, change);
        },
        py::arg("weight"), py::arg("scale"), py::arg("importance"), py::arg("bits"),
        py::arg("group_size"), py::arg("grid"), py::arg("scale_dtype"), py::arg("search"),
        py::arg("out"));

    module.def(
        "quantize_clipped",
        [](const py::object& weight, const py::object& gram, int bits, Index group_size,
           const std::string& grid, const std::string& scale_dtype, int steps, float least) {
            const GridRule rule = rule_from(bits, grid, scale_dtype, false);
            const auto w = matrix<float>(weight, "weight");
            const auto g = matrix<float>(gram, "gram", w.cols(), w.cols());
            Result result(w.rows(), w.cols(), group_size);
            auto quantized = result.quantized();
            {
                const py::gil_scoped_release release;
                quantize_clipped(w, g, rule, steps, least, quantized);
            }
            return py::make_tuple(result.codes, result.scales, result.offsets);
        },
        py::arg("weight"), py::arg("gram"), py::arg("bits"), py::arg("group_size"), py::arg("grid"),
        py::arg("scale_dtype"), py::arg("steps"), py::arg("least"));

    module.def(
        "range_grids",
        [](const py::object& low, const py::object& high, int bits, const std::string& grid,
           const std::string& scale_dtype) {
            const GridRule rule = rule_from(bits, grid, scale_dtype, false);
            const auto bottom = vector<float>(low, "low");
            const auto top = vector<float>(high, "high", bottom.size());
            py::list grids;
            for (Index row = 0; row < bottom.size(); row += lane_count) {
                const Index count = std::min<Index>(lane_count, bottom.size() - row);
                Lanes lows = Lanes::Zero(), highs = Lanes::Zero();
                lows.head(count) = bottom.segment(row, count);
                highs.head(count) = top.segment(row, count);
                py::ssize_t number = 0;
                range_grids(rule, lows, highs, [&](const GridLanes& candidate) {
                    if (row == 0)
                        grids.append(py::make_tuple(new_matrix<float>(bottom.size(), 1),
                                                    new_matrix<float>(bottom.size(), 1)));
                    const auto pair = grids[static_cast<size_t>(number++)].cast<py::tuple>();
                    auto scales = pair[0].cast<py::array_t<float>>();
                    auto offsets = pair[1].cast<py::array_t<float>>();
                    auto scale = view(scales), offset = view(offsets);
                    store_grid(rule.grid, candidate, row, 0, scale, offset);
                });
            }
            return grids;
        },
        py::arg("low"), py::arg("high"), py::arg("bits"), py::arg("grid"), py::arg("scale_dtype"));

    module.def(
        "encode",
        [](const py::object& weight, const py::object& scales, const py::object& offsets, int bits,
           Index group_size, const std::string& grid) {
            const GridRule rule = rule_from(bits, grid, "float32", false);
            const auto w = matrix<float>(weight, "weight");
            Result result(w.rows(), w.cols(), group_size);
            auto quantized = result.quantized();
            quantized.scales = matrix<float>(scales, "scales", w.rows(), quantized.scales.cols());
            quantized.offsets =
                matrix<float>(offsets, "offsets", w.rows(), quantized.scales.cols());
            {
                const py::gil_scoped_release release;
                encode(w, rule, quantized);
            }
            return result.codes;
        },
        py::arg("weight"), py::arg("scales"), py::arg("offsets"), py::arg("bits"),
        py::arg("group_size"), py::arg("grid"));
}

void bind_codes(py::module_& module) {
    module.def(
        "dequantize",
        [](const py::object& codes, const py::object& scales, const py::object& zeros,
           const py::object& biases, const py::object& groups, const py::object& out) {
            const auto c = matrix<std::uint8_t>(codes, "codes");
            const auto s = matrix<float>(scales, "scales", c.rows());
            const auto offsets = [&](const py::object& object, const char* name) -> const float* {
                return object.is_none() ? nullptr
                                        : matrix<float>(object, name, s.rows(), s.cols()).data();
            };
            const float* z = offsets(zeros, "zeros");
            const float* b = offsets(biases, "biases");
            const auto* g = optional_vector<std::int32_t>(groups, "groups", c.cols());
            if (g && (ConstVectorView<std::int32_t>(g, c.cols()).minCoeff() < 0 ||
                      ConstVectorView<std::int32_t>(g, c.cols()).maxCoeff() >= s.cols()))
                throw py::value_error("groups: expected values from 0 to " +
                                      std::to_string(s.cols() - 1));
            if (s.cols() == 0 || (!g && c.cols() % s.cols() != 0))
                throw py::value_error("scales: " + std::to_string(s.cols()) +
                                      " groups do not divide the " + std::to_string(c.cols()) +
                                      " columns of codes");
            auto w = writable_matrix<float>(out, "out", c.rows(), c.cols());
            const py::gil_scoped_release release;
            dequantize(c, s, z, b, g, w);
        },
        py::arg("codes"), py::arg("scales"), py::arg("zeros"), py::arg("biases"), py::arg("groups"),
        py::arg("out"));

    const auto check_bits = [](int bits) {
        if (bits != 2 && bits != 3 && bits != 4 && bits != 5 && bits != 6 && bits != 8)
            throw py::value_error("bits: expected 2, 3, 4, 5, 6 or 8, got " + std::to_string(bits));
    };
    module.def(
        "pack",
        [check_bits](const py::object& codes, int bits) {
            check_bits(bits);
            const auto c = matrix<std::uint8_t>(codes, "codes");
            if (c.cols() * bits % 32 != 0)
                throw py::value_error("codes: a row of " + std::to_string(c.cols()) + " codes of " +
                                      std::to_string(bits) + " bits does not fill 32-bit words");
            if (largest_code(c) >> bits)
                throw py::value_error("codes: " + std::to_string(largest_code(c)) +
                                      " does not fit in " + std::to_string(bits) + " bits");
            auto words = new_matrix<std::uint32_t>(c.rows(), c.cols() * bits / 32);
            auto target = view(words);
            {
                const py::gil_scoped_release release;
                pack(c, bits, target);
            }
            return words;
        },
        py::arg("codes"), py::arg("bits"));
    module.def(
        "unpack",
        [check_bits](const py::object& words, int bits) {
            check_bits(bits);
            const auto w = matrix<std::uint32_t>(words, "words");
            if (w.cols() * 32 % bits != 0)
                throw py::value_error("words: " + std::to_string(w.cols()) +
                                      " words a row do not hold a whole number of codes of " +
                                      std::to_string(bits) + " bits");
            auto codes = new_matrix<std::uint8_t>(w.rows(), w.cols() * 32 / bits);
            auto target = view(codes);
            {
                const py::gil_scoped_release release;
                unpack(w, bits, target);
            }
            return codes;
        },
        py::arg("words"), py::arg("bits"));
}

}  // namespace

void bind_quant(py::module_& module) {
    bind_methods(module);
    bind_refine(module);
    bind_awq(module);
    bind_codes(module);
}

}  // namespace bitwright
