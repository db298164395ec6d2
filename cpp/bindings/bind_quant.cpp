#include "bindings/arrays.hpp"
#include "bindings/bind.hpp"
#include "quant/awq.hpp"
#include "quant/codebook_types.hpp"
#include "quant/decode_blocks.hpp"
#include "quant/dequantize.hpp"
#include "quant/gguf_blocks.hpp"
#include "quant/output_metric.hpp"
#include "quant/packed_product.hpp"
#include "quant/packing.hpp"
#include "quant/quantize.hpp"
#include "quant/quantize_vectors.hpp"
#include "quant/refine.hpp"
#include "quant/refine_two_sided.hpp"
#include "quant/superblocks.hpp"

namespace bitwright {
namespace {

GridKind kind_named(const std::string& name) {
    if (name == "affine") return GridKind::affine;
    if (name == "zero_point") return GridKind::zero_point;
    if (name == "symmetric") return GridKind::symmetric;
    if (name == "table") return GridKind::table;
    throw py::value_error("kind: expected affine, zero_point, symmetric or table, got " + name);
}

ScaleType scale_type_named(const std::string& name) {
    if (name == "float32") return ScaleType::float32;
    if (name == "float16") return ScaleType::float16;
    if (name == "bfloat16") return ScaleType::bfloat16;
    if (name == "float8_e8m0fnu") return ScaleType::e8m0;
    if (name == "float8_e4m3fn") return ScaleType::e4m3;
    throw py::value_error(
        "scale_dtype: expected float32, float16, bfloat16, float8_e8m0fnu or "
        "float8_e4m3fn, got " +
        name);
}

// Points [2^bits] and the bounds [2^bits − 1] between them.
Table table_of(int bits, const py::object& points, const py::object& bounds, bool either_sign,
               float divisor) {
    const Index count = Index{1} << bits;
    const auto p = vector<float>(points, "points", count);
    const auto b = vector<float>(bounds, "bounds", count - 1);
    if (!std::is_sorted(p.begin(), p.end()) || !std::is_sorted(b.begin(), b.end()))
        throw py::value_error("points: expected points and bounds that rise");
    if (!(p[0] < 0.0f && p[count - 1] > 0.0f) || !p.allFinite())
        throw py::value_error("points: expected finite points on both sides of zero");
    if (!(divisor > 0.0f && std::isfinite(divisor)))
        throw py::value_error("divisor: expected a positive number, got " +
                              std::to_string(divisor));
    Table table{static_cast<int>(count), either_sign, divisor, {}, {}};
    std::copy(p.begin(), p.end(), table.points.begin());
    std::copy(b.begin(), b.end(), table.bounds.begin());
    return table;
}

void bind_grid(py::module_& module) {
    // Of Python's own metaclass: pybind11's is for static properties, and this has none.
    py::class_<Grid>(module, "Grid", py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)),
                     "What a method quantizes to: how each group of weights is coded.")
        .def(py::init([](int bits, Index group_size, const std::string& kind,
                         const std::string& scale_dtype, bool search, const py::object& points,
                         const py::object& bounds, bool either_sign, float divisor) {
                 if (bits < 2 || bits > 8)
                     throw py::value_error("bits: expected 2 to 8, got " + std::to_string(bits));
                 if (group_size < 1)
                     throw py::value_error("group_size: expected at least 1, got " +
                                           std::to_string(group_size));
                 const GridKind of_kind = kind_named(kind);
                 const Table table = of_kind == GridKind::table
                                         ? table_of(bits, points, bounds, either_sign, divisor)
                                         : Table{};
                 return Grid{of_kind, scale_type_named(scale_dtype), bits, group_size, search,
                             table};
             }),
             py::arg("bits"), py::arg("group_size"), py::arg("kind"),
             py::arg("scale_dtype") = "float32", py::arg("search") = false,
             py::arg("points") = py::none(), py::arg("bounds") = py::none(),
             py::arg("either_sign") = false, py::arg("divisor") = 1.0f);
}

// The number of groups in a row.
Index groups_of(const Grid& grid, Index in) {
    if (in % grid.group_size != 0)
        throw py::value_error("group_size: " + std::to_string(grid.group_size) +
                              " does not divide the " + std::to_string(in) +
                              " input channels of weight");
    return in / grid.group_size;
}

struct Result {
    py::array_t<std::uint8_t> codes;
    py::array_t<float> scales, offsets;

    Result(Index out, Index in, const Grid& grid)
        : codes(new_matrix<std::uint8_t>(out, in)),
          scales(new_matrix<float>(out, groups_of(grid, in))),
          offsets(new_matrix<float>(out, groups_of(grid, in))) {}

    QuantizedView quantized() { return {view(codes), view(scales), view(offsets)}; }
    py::tuple arrays() const { return py::make_tuple(codes, scales, offsets); }
};

void bind_methods(py::module_& module) {
    module.def(
        "quantize_rtn",
        [](const py::object& weight, const py::object& importance, const Grid& grid) {
            py::tuple outcome;
            with_weight(weight, "weight", [&](auto w) {
                const auto h = vector<float>(importance, "importance", w.cols());
                Result result(w.rows(), w.cols(), grid);
                const auto quantized = result.quantized();
                {
                    const py::gil_scoped_release release;
                    quantize_rtn(w, h, grid, quantized);
                }
                outcome = result.arrays();
            });
            return outcome;
        },
        py::arg("weight"), py::arg("importance"), py::arg("grid"));

    module.def(
        "encode",
        [](const py::object& weight, const py::object& scales, const py::object& offsets,
           const Grid& grid) {
            const auto w = matrix<float>(weight, "weight");
            const Index out = w.rows(), groups = groups_of(grid, w.cols());
            const auto s = matrix<float>(scales, "scales", out, groups);
            const auto o = matrix<float>(offsets, "offsets", out, groups);
            auto codes = new_matrix<std::uint8_t>(out, w.cols());
            auto target = view(codes);
            {
                const py::gil_scoped_release release;
                encode(w, s, o, grid, target);
            }
            return codes;
        },
        py::arg("weight"), py::arg("scales"), py::arg("offsets"), py::arg("grid"));

    module.def(
        "quantize_gptq",
        [](const py::object& weight, const py::object& upper, const py::object& order,
           const py::object& importance, const Grid& grid, Index block_size, bool static_groups,
           const py::object& scales, const py::object& offsets) {
            if (block_size < 1) throw py::value_error("block_size: expected at least 1");
            py::tuple outcome;
            with_weight(weight, "weight", [&](auto w) {
                const Index in = w.cols();
                const auto u = matrix<float>(upper, "upper", in, in);
                const auto columns = vector<std::int32_t>(order, "order", in);
                if (!are_indices(columns, in))
                    throw py::value_error("order: expected a permutation of weight's columns");
                const auto h = vector<float>(importance, "importance", in);
                Result result(w.rows(), in, grid);
                auto quantized = result.quantized();
                auto grids = static_groups ? GridsFrom::original : GridsFrom::progress;
                if (!scales.is_none()) {
                    grids = GridsFrom::result;
                    const Index groups = quantized.scales.cols();
                    quantized.scales = matrix<float>(scales, "scales", w.rows(), groups);
                    quantized.offsets = matrix<float>(offsets, "offsets", w.rows(), groups);
                }
                py::array_t<double> losses(in);
                const VectorView<double> loss(losses.mutable_data(), in);
                {
                    const py::gil_scoped_release release;
                    quantize_gptq(w, u, columns, h, grid, block_size, grids, quantized, loss);
                }
                outcome = py::make_tuple(result.codes, result.scales, result.offsets, losses);
            });
            return outcome;
        },
        py::arg("weight"), py::arg("upper"), py::arg("order"), py::arg("importance"),
        py::arg("grid"), py::arg("block_size"), py::arg("static_groups"),
        py::arg("scales") = py::none(), py::arg("offsets") = py::none());

    module.def(
        "refine",
        [](const py::object& weight, const py::object& gram, const py::object& codes,
           const py::object& scales, const py::object& offsets, const Grid& grid, Index rounds,
           bool codes_only) {
            const auto w = matrix<float>(weight, "weight");
            const Index out = w.rows(), in = w.cols(), groups = groups_of(grid, in);
            const auto g = matrix<float>(gram, "gram", in, in);
            const QuantizedView result{writable_matrix<std::uint8_t>(codes, "codes", out, in),
                                       writable_matrix<float>(scales, "scales", out, groups),
                                       writable_matrix<float>(offsets, "offsets", out, groups)};
            if (rounds < 0) throw py::value_error("rounds: expected 0 or more");
            py::array_t<double> objectives(rounds + 1);
            const VectorView<double> values(objectives.mutable_data(), rounds + 1);
            {
                const py::gil_scoped_release release;
                refine(w, g, grid, rounds, codes_only, result, values);
            }
            return objectives;
        },
        py::arg("weight"), py::arg("gram"), py::arg("codes"), py::arg("scales"), py::arg("offsets"),
        py::arg("grid"), py::arg("rounds"), py::arg("codes_only") = false);

    module.def(
        "refine_two_sided",
        [](const py::object& weight, const py::object& gram, const py::object& outputs,
           const py::object& codes, const py::object& scales, const py::object& offsets,
           const Grid& grid, Index sweeps, Index fits) {
            const auto w = matrix<float>(weight, "weight");
            const Index out = w.rows(), in = w.cols(), groups = groups_of(grid, in);
            const auto g = matrix<float>(gram, "gram", in, in);
            const auto o = matrix<float>(outputs, "outputs", out);
            const QuantizedView result{writable_matrix<std::uint8_t>(codes, "codes", out, in),
                                       writable_matrix<float>(scales, "scales", out, groups),
                                       writable_matrix<float>(offsets, "offsets", out, groups)};
            if (sweeps < 0) throw py::value_error("sweeps: expected 0 or more");
            if (o.cols() < 1) throw py::value_error("outputs: expected at least one column");
            py::array_t<double> objectives(sweeps + 1);
            const VectorView<double> values(objectives.mutable_data(), sweeps + 1);
            {
                const py::gil_scoped_release release;
                refine_two_sided(w, g, o, grid, sweeps, fits, result, values);
            }
            return objectives;
        },
        py::arg("weight"), py::arg("gram"), py::arg("outputs"), py::arg("codes"), py::arg("scales"),
        py::arg("offsets"), py::arg("grid"), py::arg("sweeps"), py::arg("fits"));

    module.def(
        "add_output_metric",
        [](const py::object& gradient, const py::object& weight, const py::object& sum) {
            const auto g = matrix<float>(gradient, "gradient");
            const auto w = vector<float>(weight, "weight", g.rows());
            const auto total = writable_matrix<float>(sum, "sum", g.cols());
            if (total.cols() < 1) throw py::value_error("sum: expected at least one column");
            const py::gil_scoped_release release;
            add_output_metric(g, w, total);
        },
        py::arg("gradient"), py::arg("weight"), py::arg("sum"));
}

// A metric of Python's, called with the interpreter's lock in hand.
RowErrors python_errors(const py::function& errors, Result& candidate) {
    return [&errors, &candidate](VectorView<double> found) {
        const py::gil_scoped_acquire acquire;
        const py::object measured = errors(candidate.codes, candidate.scales, candidate.offsets);
        found = vector<double>(measured, "errors", found.size());
    };
}

void bind_awq(py::module_& module) {
    module.def(
        "scaled_rounding_change",
        [](const py::object& weight, const py::object& scale, const py::object& importance,
           const Grid& grid, const py::object& out) {
            const auto w = matrix<float>(weight, "weight");
            groups_of(grid, w.cols());
            const auto s = vector<float>(scale, "scale", w.cols());
            const auto h = vector<float>(importance, "importance", w.cols());
            const auto change = writable_matrix<float>(out, "out", w.rows(), w.cols());
            const py::gil_scoped_release release;
            scaled_rounding_change(w, s, h, grid, change);
        },
        py::arg("weight"), py::arg("scale"), py::arg("importance"), py::arg("grid"),
        py::arg("out"));

    module.def(
        "quantize_clipped",
        [](const py::object& weight, const py::object& gram, const Grid& grid, int steps,
           float least) {
            const auto w = matrix<float>(weight, "weight");
            const auto g = matrix<float>(gram, "gram", w.cols(), w.cols());
            Result result(w.rows(), w.cols(), grid);
            const auto quantized = result.quantized();
            {
                const py::gil_scoped_release release;
                quantize_clipped(w, g, grid, steps, least, quantized);
            }
            return result.arrays();
        },
        py::arg("weight"), py::arg("gram"), py::arg("grid"), py::arg("steps"), py::arg("least"));

    module.def(
        "quantize_clipped_by",
        [](const py::object& weight, const Grid& grid, const py::object& shares,
           const py::function& errors) {
            const auto w = matrix<float>(weight, "weight", -1, grid.group_size);
            if (w.cols() < 1) throw py::value_error("weight: expected at least one column");
            const auto s = vector<float>(shares, "shares");
            Result result(w.rows(), w.cols(), grid), candidate(w.rows(), w.cols(), grid);
            const auto quantized = result.quantized(), tried = candidate.quantized();
            const auto measure = python_errors(errors, candidate);
            {
                const py::gil_scoped_release release;
                quantize_clipped_by(w, grid, s, measure, tried, quantized);
            }
            return result.arrays();
        },
        py::arg("weight"), py::arg("grid"), py::arg("shares"), py::arg("errors"));
}

// For views of which a kernel may write to one and reads the other.
template <typename Scalar>
MatrixView<Scalar> mutable_matrix(const py::object& object, const char* name, Index rows,
                                  Index columns) {
    const auto view = matrix<Scalar>(object, name, rows, columns);
    return {const_cast<Scalar*>(view.data()), rows, columns};
}

// Superblocks that Python gave or is given; symmetric grids have no mins.
struct Superblocks {
    py::object d, scale_codes, dmin = py::none(), min_codes = py::none();

    static Superblocks empty(Index out, Index blocks, const KGrid& grid) {
        Superblocks made{new_halves(out, blocks),
                         new_matrix<std::int8_t>(out, blocks * grid.groups())};
        if (!grid.affine) return made;
        made.dmin = new_halves(out, blocks);
        made.min_codes = new_matrix<std::uint8_t>(out, blocks * grid.groups());
        return made;
    }

    SuperblocksView checked(Index out, Index blocks, const KGrid& grid) const {
        const Index groups = blocks * grid.groups();
        SuperblocksView view{mutable_matrix<Eigen::half>(d, "d", out, blocks),
                             mutable_matrix<std::int8_t>(scale_codes, "scale_codes", out, groups),
                             {nullptr, 0, 0},
                             {nullptr, 0, 0}};
        if (!grid.affine) return view;
        return {view.d, view.scale_codes, mutable_matrix<Eigen::half>(dmin, "dmin", out, blocks),
                mutable_matrix<std::uint8_t>(min_codes, "min_codes", out, groups)};
    }

    py::tuple arrays() const { return py::make_tuple(d, scale_codes, dmin, min_codes); }
};

// "" stands for a k grid.
KGrid k_grid(int bits, const std::string& table) {
    if (const CodebookType* type = codebook_type(table)) return type->scales();
    if (table == "iq4_xs" && bits != 4) throw py::value_error("bits: iq4_xs has 4");
    if (table == "iq4_xs") return KGrid::iq4_xs();
    if (!table.empty()) throw py::value_error("table: none with superblocks is called " + table);
    if (bits < 2 || bits > 6)
        throw py::value_error("bits: expected 2 to 6, got " + std::to_string(bits));
    return KGrid::of(bits);
}

// The number of blocks in a row of weights or bytes.
Index blocks_in(Index row, Index size) {
    if (row % size != 0)
        throw py::value_error("blocks: " + std::to_string(row) +
                              " are no whole number of blocks of " + std::to_string(size));
    return row / size;
}

void require_planes(const KGrid& grid) {
    if (grid.odd) throw py::value_error("table: blocks of vectors are for pack_vectors");
}

void bind_superblocks(py::module_& module) {
    module.def(
        "fit_superblocks",
        [](const py::object& scales, const py::object& offsets, const py::object& importance,
           int bits, const std::string& table) -> py::object {
            const KGrid grid = k_grid(bits, table);
            const auto h = vector<float>(importance, "importance");
            const Index blocks = blocks_in(h.size(), superblock_size),
                        groups = blocks * grid.groups();
            const auto s = matrix<float>(scales, "scales", -1, groups);
            const auto o = matrix<float>(offsets, "offsets", s.rows(), groups);
            const auto result = Superblocks::empty(s.rows(), blocks, grid);
            const auto target = result.checked(s.rows(), blocks, grid);
            bool held = false;
            {
                const py::gil_scoped_release release;
                held = fit_superblocks(s, o, h, grid, target);
            }
            return held ? py::object(result.arrays()) : py::none();
        },
        py::arg("scales"), py::arg("offsets"), py::arg("importance"), py::arg("bits"),
        py::arg("table") = "");

    module.def(
        "closed_form",
        [](const py::object& weight, const py::object& codes, const py::object& importance,
           int bits, const py::object& points, const std::string& table) {
            const float* of_codes = optional_vector<float>(points, "points", every_code);
            const KGrid grid = k_grid(bits, table);
            if (grid.table != (of_codes != nullptr))
                throw py::value_error("points: expected those of a table, or none");
            const auto w = matrix<float>(weight, "weight");
            const auto c = matrix<std::uint8_t>(codes, "codes", w.rows(), w.cols());
            const auto h = vector<float>(importance, "importance", w.cols());
            const Index groups = blocks_in(w.cols(), superblock_size) * grid.groups();
            auto scales = new_matrix<float>(w.rows(), groups);
            auto offsets = new_matrix<float>(w.rows(), groups);
            const auto s = view(scales), o = view(offsets);
            {
                const py::gil_scoped_release release;
                closed_form(w, c, h, grid, of_codes, s, o);
            }
            return py::make_tuple(scales, offsets);
        },
        py::arg("weight"), py::arg("codes"), py::arg("importance"), py::arg("bits"),
        py::arg("points") = py::none(), py::arg("table") = "");

    module.def(
        "pack_superblocks",
        [](const py::object& codes, const py::object& d, const py::object& scale_codes,
           const py::object& dmin, const py::object& min_codes, int bits,
           const std::string& table) {
            const KGrid grid = k_grid(bits, table);
            require_planes(grid);
            const auto c = matrix<std::uint8_t>(codes, "codes");
            const Index blocks = blocks_in(c.cols(), superblock_size);
            const auto grids =
                Superblocks{d, scale_codes, dmin, min_codes}.checked(c.rows(), blocks, grid);
            auto packed = new_matrix<std::uint8_t>(c.rows(), blocks * superblock_bytes(grid));
            const auto target = view(packed);
            {
                const py::gil_scoped_release release;
                pack_superblocks(c, grids, grid, target);
            }
            return packed;
        },
        py::arg("codes"), py::arg("d"), py::arg("scale_codes"), py::arg("dmin"),
        py::arg("min_codes"), py::arg("bits"), py::arg("table") = "");

    module.def(
        "unpack_superblocks",
        [](const py::object& blocks, int bits, const std::string& table) {
            const KGrid grid = k_grid(bits, table);
            require_planes(grid);
            const auto packed = matrix<std::uint8_t>(blocks, "blocks");
            const Index count = blocks_in(packed.cols(), superblock_bytes(grid));
            auto codes = new_matrix<std::uint8_t>(packed.rows(), count * superblock_size);
            const auto c = view(codes);
            const auto result = Superblocks::empty(packed.rows(), count, grid);
            const auto grids = result.checked(packed.rows(), count, grid);
            {
                const py::gil_scoped_release release;
                unpack_superblocks(packed, grid, c, grids);
            }
            return py::make_tuple(codes, result.d, result.scale_codes, result.dmin,
                                  result.min_codes);
        },
        py::arg("blocks"), py::arg("bits"), py::arg("table") = "");
}

void check_block_bits(int bits) {
    if (bits != 4 && bits != 5 && bits != 8)
        throw py::value_error("bits: expected 4, 5 or 8, got " + std::to_string(bits));
}

void bind_blocks(py::module_& module) {
    module.def(
        "pack_blocks",
        [](const py::object& codes, const py::object& d, const py::object& m, int bits) {
            check_block_bits(bits);
            const auto c = matrix<std::uint8_t>(codes, "codes");
            const Index blocks = blocks_in(c.cols(), weights_per_block);
            const auto scales = matrix<Eigen::half>(d, "d", c.rows(), blocks);
            const auto biases = m.is_none() ? ConstMatrixView<Eigen::half>(nullptr, 0, 0)
                                            : matrix<Eigen::half>(m, "m", c.rows(), blocks);
            auto packed =
                new_matrix<std::uint8_t>(c.rows(), blocks * block_bytes(bits, !m.is_none()));
            const auto target = view(packed);
            {
                const py::gil_scoped_release release;
                pack_blocks(c, scales, biases, bits, target);
            }
            return packed;
        },
        py::arg("codes"), py::arg("d"), py::arg("m"), py::arg("bits"));

    module.def(
        "unpack_blocks",
        [](const py::object& blocks, int bits, bool affine) {
            check_block_bits(bits);
            const auto packed = matrix<std::uint8_t>(blocks, "blocks");
            const Index rows = packed.rows(),
                        count = blocks_in(packed.cols(), block_bytes(bits, affine));
            auto codes = new_matrix<std::uint8_t>(rows, count * weights_per_block);
            py::array d = new_halves(rows, count), m = new_halves(affine ? rows : 0, count);
            const auto c = view(codes);
            const auto scales = half_view(d), biases = half_view(m);
            {
                const py::gil_scoped_release release;
                unpack_blocks(packed, bits, c, scales, biases);
            }
            return py::make_tuple(codes, d, affine ? py::object(m) : py::none());
        },
        py::arg("blocks"), py::arg("bits"), py::arg("affine"));
}

void bind_decoding(py::module_& module) {
    module.def(
        "decode_blocks",
        [](const py::object& blocks, const std::string& name) {
            const BlockType* type = block_type(name);
            if (!type) throw py::value_error("name: no type of blocks is called " + name);
            const auto packed = matrix<std::uint8_t>(blocks, "blocks");
            const Index count = blocks_in(packed.cols(), type->bytes);
            auto weights = new_matrix<float>(packed.rows(), count * type->weights);
            const auto w = view(weights);
            {
                const py::gil_scoped_release release;
                decode_blocks(packed, *type, w);
            }
            return weights;
        },
        py::arg("blocks"), py::arg("name"));

    module.def(
        "codebook",
        [](const std::string& name) {
            constexpr std::array names = {"IQ1_S", "IQ2_XXS", "IQ2_XS",
                                          "IQ2_S", "IQ3_XXS", "IQ3_S"};
            const auto found = std::find(names.begin(), names.end(), name);
            if (found == names.end()) throw py::value_error("name: no codebook is called " + name);
            const Codebook& book = codebook(static_cast<CodebookName>(found - names.begin()));
            auto vectors = new_matrix<std::int8_t>(book.size(), book.width);
            std::copy(book.values.begin(), book.values.end(), view(vectors).data());
            return vectors;
        },
        py::arg("name"));
}

void check_bits(int bits) {
    if (bits != 2 && bits != 3 && bits != 4 && bits != 5 && bits != 6 && bits != 8)
        throw py::value_error("bits: expected 2, 3, 4, 5, 6 or 8, got " + std::to_string(bits));
}

const CodebookType& type_named(const std::string& name) {
    const CodebookType* type = codebook_type(name);
    if (!type) throw py::value_error("type: none with a codebook is called " + name);
    return *type;
}

void bind_vectors(py::module_& module) {
    module.def(
        "pack_vectors",
        [](const py::object& codes, const py::object& d, const py::object& scale_codes,
           const std::string& name) -> py::object {
            const CodebookType& type = type_named(name);
            const auto c = matrix<std::uint8_t>(codes, "codes");
            const Index blocks = blocks_in(c.cols(), superblock_size);
            const auto grids = Superblocks{d, scale_codes}.checked(c.rows(), blocks, type.scales());
            auto packed = new_matrix<std::uint8_t>(c.rows(), blocks * type.bytes);
            const auto target = view(packed);
            bool held = false;
            {
                const py::gil_scoped_release release;
                held = pack_vectors(c, grids, type, target);
            }
            return held ? py::object(packed) : py::none();
        },
        py::arg("codes"), py::arg("d"), py::arg("scale_codes"), py::arg("type"));

    module.def(
        "unpack_vectors",
        [](const py::object& blocks, const std::string& name) {
            const CodebookType& type = type_named(name);
            const auto packed = matrix<std::uint8_t>(blocks, "blocks");
            const Index count = blocks_in(packed.cols(), type.bytes);
            auto codes = new_matrix<std::uint8_t>(packed.rows(), count * superblock_size);
            const auto c = view(codes);
            const auto result = Superblocks::empty(packed.rows(), count, type.scales());
            const auto grids = result.checked(packed.rows(), count, type.scales());
            {
                const py::gil_scoped_release release;
                unpack_vectors(packed, type, c, grids);
            }
            return py::make_tuple(codes, result.d, result.scale_codes);
        },
        py::arg("blocks"), py::arg("type"));

    module.def(
        "vector_scales",
        [](const py::object& weight, const py::object& importance, const std::string& name,
           bool search) {
            const CodebookType& type = type_named(name);
            const auto w = matrix<float>(weight, "weight");
            const auto h = vector<float>(importance, "importance", w.cols());
            blocks_in(w.cols(), superblock_size);
            auto scales = new_matrix<float>(w.rows(), w.cols() / type.group_size);
            const auto s = view(scales);
            {
                const py::gil_scoped_release release;
                vector_scales(w, h, type, search, s);
            }
            return scales;
        },
        py::arg("weight"), py::arg("importance"), py::arg("type"), py::arg("search"));

    module.def(
        "encode_vectors",
        [](const py::object& weight, const py::object& scales, const py::object& importance,
           const std::string& name) {
            const CodebookType& type = type_named(name);
            const auto w = matrix<float>(weight, "weight");
            blocks_in(w.cols(), superblock_size);
            const auto s = matrix<float>(scales, "scales", w.rows(), w.cols() / type.group_size);
            const auto h = vector<float>(importance, "importance", w.cols());
            auto codes = new_matrix<std::uint8_t>(w.rows(), w.cols());
            const auto c = view(codes);
            {
                const py::gil_scoped_release release;
                encode_vectors(w, s, h, type, c);
            }
            return codes;
        },
        py::arg("weight"), py::arg("scales"), py::arg("importance"), py::arg("type"));

    module.def(
        "quantize_vectors",
        [](const py::object& weight, const py::object& upper, const py::object& order,
           const py::object& codes, const py::object& scales, const std::string& name,
           Index block_size) {
            const CodebookType& type = type_named(name);
            const auto w = matrix<float>(weight, "weight");
            const Index in = w.cols();
            blocks_in(in, superblock_size);
            const auto u = matrix<float>(upper, "upper", in, in);
            const auto columns = vector<std::int32_t>(order, "order", in);
            if (!are_indices(columns, in) || !are_units(columns))
                throw py::value_error("order: expected a permutation of runs of " +
                                      std::to_string(unit_size) + " of weight's columns");
            const auto c = writable_matrix<std::uint8_t>(codes, "codes", w.rows(), in);
            const auto s = matrix<float>(scales, "scales", w.rows(), in / type.group_size);
            if (block_size < 1) throw py::value_error("block_size: expected at least 1");
            py::array_t<double> losses(in);
            const VectorView<double> loss(losses.mutable_data(), in);
            {
                const py::gil_scoped_release release;
                quantize_vectors(w, u, columns, s, type, block_size, c, loss);
            }
            return losses;
        },
        py::arg("weight"), py::arg("upper"), py::arg("order"), py::arg("codes"), py::arg("scales"),
        py::arg("type"), py::arg("block_size"));

    module.def(
        "refine_vectors",
        [](const py::object& weight, const py::object& gram, const py::object& codes,
           const py::object& d, const py::object& scale_codes, const std::string& name,
           Index rounds) {
            const CodebookType& type = type_named(name);
            const auto w = matrix<float>(weight, "weight");
            const Index in = w.cols(), blocks = blocks_in(in, superblock_size);
            const auto g = matrix<float>(gram, "gram", in, in);
            const auto c = writable_matrix<std::uint8_t>(codes, "codes", w.rows(), in);
            const SuperblocksView grids{
                writable_matrix<Eigen::half>(d, "d", w.rows(), blocks),
                writable_matrix<std::int8_t>(scale_codes, "scale_codes", w.rows(),
                                             in / type.group_size),
                {nullptr, 0, 0},
                {nullptr, 0, 0}};
            for (Index i = 0; i < c.size(); ++i)
                if (c.data()[i] >= type.points())
                    throw py::value_error("codes: expected values below " +
                                          std::to_string(type.points()));
            if (rounds < 0) throw py::value_error("rounds: expected 0 or more");
            py::array_t<double> objectives(rounds + 1);
            const VectorView<double> values(objectives.mutable_data(), rounds + 1);
            {
                const py::gil_scoped_release release;
                refine_vectors(w, g, type, rounds, c, grids, values);
            }
            return objectives;
        },
        py::arg("weight"), py::arg("gram"), py::arg("codes"), py::arg("d"), py::arg("scale_codes"),
        py::arg("type"), py::arg("rounds"));
}

void bind_codes(py::module_& module) {
    module.def(
        "dequantize",
        [](const py::object& codes, const py::object& scales, const py::object& zeros,
           const py::object& biases, const py::object& groups, const py::object& out,
           const py::object& points) {
            const float* of_codes = optional_vector<float>(points, "points", every_code);
            const auto c = matrix<std::uint8_t>(codes, "codes");
            const auto s = matrix<float>(scales, "scales", c.rows());
            const auto offsets = [&](const py::object& object, const char* name) -> const float* {
                return object.is_none() ? nullptr
                                        : matrix<float>(object, name, s.rows(), s.cols()).data();
            };
            const float* z = offsets(zeros, "zeros");
            const float* b = offsets(biases, "biases");
            const auto* g = optional_vector<std::int32_t>(groups, "groups", c.cols());
            if (g && !are_indices(ConstVectorView<std::int32_t>(g, c.cols()), s.cols()))
                throw py::value_error("groups: expected values from 0 to " +
                                      std::to_string(s.cols() - 1));
            if (s.cols() == 0 || (!g && c.cols() % s.cols() != 0))
                throw py::value_error("scales: " + std::to_string(s.cols()) +
                                      " groups do not divide the " + std::to_string(c.cols()) +
                                      " columns of codes");
            auto w = writable_matrix<float>(out, "out", c.rows(), c.cols());
            const py::gil_scoped_release release;
            dequantize(c, s, z, b, g, of_codes, w);
        },
        py::arg("codes"), py::arg("scales"), py::arg("zeros"), py::arg("biases"), py::arg("groups"),
        py::arg("out"), py::arg("points") = py::none());

    module.def(
        "pack",
        [](const py::object& codes, int bits) {
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
        [](const py::object& words, int bits) {
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

// A matrix of numbers in whichever of these types it has; extents of −1 are free.
StoredNumbers stored_numbers(const py::object& object, const char* name, Index rows,
                             Index columns) {
    StoredNumbers numbers;
    if (object.is_none()) return numbers;
    const py::array array = contiguous(object, name, 2);
    require_extent(array, name, 0, rows);
    require_extent(array, name, 1, columns);
    const auto is = [&]<typename Scalar>(Scalar, StoredNumbers::Type type) {
        if (!has_dtype<Scalar>(array)) return false;
        numbers = {array.data(), array.shape(1), type};
        return true;
    };
    if (!is(float{}, StoredNumbers::Type::float32) &&
        !is(std::uint8_t{}, StoredNumbers::Type::uint8) &&
        !is(std::int8_t{}, StoredNumbers::Type::int8) &&
        !is(Eigen::half{}, StoredNumbers::Type::float16) &&
        !is(Eigen::bfloat16{}, StoredNumbers::Type::bfloat16))
        throw py::type_error(std::string(name) +
                             ": expected dtype float32, float16, bfloat16, int8 or uint8, got " +
                             describe(array));
    return numbers;
}

// What is packed, checked once; the arrays are kept.
struct PackedMatrix {
    py::object planes, scales, offsets, superscales, supermins, points;
    PackedWeight weight;

    PackedMatrix(const py::object& of_planes, Index channels, int bits, const py::object& of_scales,
                 const py::object& of_offsets, const py::object& of_superscales,
                 const py::object& of_supermins, const py::object& of_points, float zero,
                 float divisor)
        : planes(of_planes),
          scales(of_scales),
          offsets(of_offsets),
          superscales(of_superscales),
          supermins(of_supermins),
          points(of_points),
          weight{matrix<std::uint8_t>(of_planes, "planes"), channels, bits, {}, {}, {}, {}} {
        check_bits(bits);
        if (channels < 1 || weight.planes.cols() != packed_bytes(channels, bits))
            throw py::value_error("planes: they do not hold " + std::to_string(channels) +
                                  " codes a row");
        const Index rows = weight.planes.rows();
        weight.scales = stored_numbers(scales, "scales", rows, -1);
        if (!weight.scales.data || weight.groups() < 1 || channels % weight.groups() != 0)
            throw py::value_error("scales: their number must divide the channels");
        weight.offsets = stored_numbers(offsets, "offsets", rows, weight.groups());
        weight.superscales = stored_numbers(superscales, "superscales", rows, -1);
        weight.supermins = stored_numbers(supermins, "supermins", rows, -1);
        for (const StoredNumbers* numbers : {&weight.superscales, &weight.supermins})
            if (numbers->data && (numbers->columns < 1 || weight.groups() % numbers->columns != 0))
                throw py::value_error("superscales: their number must divide that of the scales");
        weight.points = optional_vector<float>(points, "points", every_code);
        weight.zero = zero;
        weight.divisor = divisor;
    }
};

void bind_packed(py::module_& module) {
    py::class_<PackedMatrix>(module, "PackedMatrix",
                             py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)))
        .def(py::init<const py::object&, Index, int, const py::object&, const py::object&,
                      const py::object&, const py::object&, const py::object&, float, float>(),
             py::arg("planes"), py::arg("channels"), py::arg("bits"), py::arg("scales"),
             py::arg("offsets") = py::none(), py::arg("superscales") = py::none(),
             py::arg("supermins") = py::none(), py::arg("points") = py::none(),
             py::arg("zero") = 0.0f, py::arg("divisor") = 1.0f);
    module.def(
        "pack_planes",
        [](const py::object& codes, int bits) {
            check_bits(bits);
            const auto c = matrix<std::uint8_t>(codes, "codes");
            auto planes = new_matrix<std::uint8_t>(c.rows(), packed_bytes(c.cols(), bits));
            auto target = view(planes);
            {
                const py::gil_scoped_release release;
                pack_planes(c, bits, target);
            }
            return planes;
        },
        py::arg("codes"), py::arg("bits"));
    module.def(
        "decode_packed",
        [](const PackedMatrix& packed, const py::object& out) {
            auto w = writable_matrix<float>(out, "out", packed.weight.planes.rows(),
                                            packed.weight.channels);
            const py::gil_scoped_release release;
            decode_packed(packed.weight, w);
        },
        py::arg("packed"), py::arg("out"));
    module.def(
        "packed_linear",
        [](const py::object& input, const PackedMatrix& packed, const py::object& bias,
           const py::object& out, bool add) {
            const Index rows = packed.weight.planes.rows();
            const auto x = matrix<float>(input, "input", -1, packed.weight.channels);
            const float* b = optional_vector<float>(bias, "bias", rows);
            auto y = writable_matrix<float>(out, "out", x.rows(), rows);
            const py::gil_scoped_release release;
            packed_linear(x, packed.weight, b, add, y);
        },
        py::arg("input"), py::arg("packed"), py::arg("bias"), py::arg("out"), py::arg("add"));
    module.def(
        "stored_linear",
        [](const py::object& input, const py::object& weight, const py::object& bias,
           const py::object& out, bool add) {
            const auto x = matrix<float>(input, "input");
            const auto w = stored_numbers(weight, "weight", -1, x.cols());
            if (!w.data) throw py::type_error("weight: expected a NumPy array, got None");
            const Index rows = py::reinterpret_borrow<py::array>(weight).shape(0);
            const float* b = optional_vector<float>(bias, "bias", rows);
            auto y = writable_matrix<float>(out, "out", x.rows(), rows);
            const py::gil_scoped_release release;
            stored_linear(x, w, b, add, y);
        },
        py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("add"));
}

}  // namespace

void bind_quant(py::module_& module) {
    bind_grid(module);
    bind_methods(module);
    bind_awq(module);
    bind_superblocks(module);
    bind_blocks(module);
    bind_decoding(module);
    bind_vectors(module);
    bind_codes(module);
    bind_packed(module);
}

}  // namespace bitwright
