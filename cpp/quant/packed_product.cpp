#include "quant/packed_product.hpp"

#include <algorithm>
#include <vector>

#include "linalg/sum.hpp"
#include "linalg/threads.hpp"

namespace bitwright {
namespace {

constexpr Index few_tokens = 8;  // up to which dot products are faster than decoding for a product
constexpr Index product_rows = 64, product_grain = 16;
constexpr Index product_lanes = 16;
using ProductLanes = Eigen::Array<float, product_lanes, 1>;
using ProductLanesView = Eigen::Map<const ProductLanes>;

template <int width>
void pack_plane(const std::uint8_t* codes, int shift, std::uint8_t* bytes) {
    constexpr int count = 8 * width, mask = (1 << width) - 1;
    for (int j = 0; j < count; ++j) {
        int byte = 0;
        for (int k = 0; k < 8 / width; ++k)
            byte |= (codes[j + k * count] >> shift & mask) << (k * width);
        bytes[j] = static_cast<std::uint8_t>(byte);
    }
}

template <int width>
void add_plane(const std::uint8_t* bytes, int shift, std::uint8_t* codes) {
    constexpr int count = 8 * width, mask = (1 << width) - 1;
    for (int k = 0; k < 8 / width; ++k)
        for (int j = 0; j < count; ++j)
            codes[j + k * count] = static_cast<std::uint8_t>(
                codes[j + k * count] | (bytes[j] >> (k * width) & mask) << shift);
}

// Calls body(width, shift, first byte) for every plane of a block.
template <int bits, typename Body>
void each_plane(const Body& body) {
    int shift = 0;
    const auto plane = [&]<int width>(std::integral_constant<int, width> w) {
        if constexpr ((bits & width) != 0) {
            body(w, shift, 8 * shift);
            shift += width;
        }
    };
    plane(std::integral_constant<int, 8>{});
    plane(std::integral_constant<int, 4>{});
    plane(std::integral_constant<int, 2>{});
    plane(std::integral_constant<int, 1>{});
}

template <typename Body>
void with_bits(int bits, const Body& body) {
    switch (bits) {
        case 2:
            return body(std::integral_constant<int, 2>{});
        case 3:
            return body(std::integral_constant<int, 3>{});
        case 4:
            return body(std::integral_constant<int, 4>{});
        case 5:
            return body(std::integral_constant<int, 5>{});
        case 6:
            return body(std::integral_constant<int, 6>{});
        default:
            return body(std::integral_constant<int, 8>{});
    }
}

// The codes of a row as floats, in whole blocks.
template <int bits>
void unpack_row(const std::uint8_t* planes, Index blocks, float* codes) {
    for (Index block = 0; block < blocks; ++block) {
        alignas(64) std::uint8_t bytes[packed_block] = {};
        each_plane<bits>([&]<int width>(std::integral_constant<int, width>, int shift, int first) {
            add_plane<width>(planes + block * 8 * bits + first, shift, bytes);
        });
        float* target = codes + block * packed_block;
        for (Index i = 0; i < packed_block; ++i) target[i] = static_cast<float>(bytes[i]);
    }
}

// What a thread decodes rows into.
struct Row {
    const PackedWeight& from;
    Index size;  // of a group
    AlignedRow<float> codes, scales, biases, super;

    explicit Row(const PackedWeight& packed)
        : from(packed),
          size(packed.channels / packed.groups()),
          codes((packed.channels + packed_block - 1) / packed_block * packed_block),
          scales(packed.groups()),
          biases(packed.groups()),
          super(packed.groups()) {}

    void read(Index row) {
        const std::uint8_t* planes = from.planes.data() + row * from.planes.cols();
        with_bits(from.bits, [&]<int bits>(std::integral_constant<int, bits>) {
            unpack_row<bits>(planes, codes.size() / packed_block, codes.data());
        });
        if (from.points)
            for (Index i = 0; i < from.channels; ++i)
                codes[i] = from.points[static_cast<std::uint8_t>(codes[i])];
        from.scales.row(row, scales.data());
        if (from.superscales.data) scales *= spread(from.superscales, row);
        if (from.divisor != 1) scales /= from.divisor;
        if (!from.offsets.data) {
            biases = scales * -from.zero;
            return;
        }
        from.offsets.row(row, biases.data());
        if (from.supermins.data)
            biases *= -spread(from.supermins, row);
        else if (from.offsets.type == StoredNumbers::Type::uint8)
            biases *= -scales;
    }

    const AlignedRow<float>& spread(const StoredNumbers& numbers, Index row) {
        AlignedRow<float> own(numbers.columns);
        numbers.row(row, own.data());
        const Index each = super.size() / own.size();
        for (Index group = 0; group < super.size(); ++group) super[group] = own[group / each];
        return super;
    }

    void decode(float* weight) const {
        for (Index group = 0; group < scales.size(); ++group)
            for (Index i = group * size; i < (group + 1) * size; ++i)
                weight[i] = scales[group] * codes[i] + biases[group];
    }

    float product(const float* states, const float* sums) const {
        ProductLanes total = ProductLanes::Zero();
        float rest = 0;
        for (Index group = 0; group < scales.size(); ++group) {
            const float* code = codes.data() + group * size;
            const float* state = states + group * size;
            ProductLanes part = ProductLanes::Zero();
            Index i = 0;
            for (; i + product_lanes <= size; i += product_lanes)
                part += ProductLanesView(code + i) * ProductLanesView(state + i);
            float left = 0;
            for (; i < size; ++i) left += code[i] * state[i];
            total += scales[group] * part;
            rest += scales[group] * left + biases[group] * sums[group];
        }
        return sum(total) + rest;
    }
};

float row_product(const float* weight, const float* states, Index count) {
    ProductLanes total = ProductLanes::Zero();
    Index i = 0;
    for (; i + product_lanes <= count; i += product_lanes)
        total += ProductLanesView(weight + i) * ProductLanesView(states + i);
    float rest = 0;
    for (; i < count; ++i) rest += weight[i] * states[i];
    return sum(total) + rest;
}

void put(float value, const float* bias, bool adds, Index column, float& target) {
    if (bias) value += bias[column];
    target = adds ? target + value : value;
}

// output = states · weightᵀ for many tokens; decode(row, target) gives the rows of the weight.
template <typename Decoder>
void tiled_product(ConstMatrixView<float> states, const Decoder& decoder, const float* bias,
                   bool adds, MatrixView<float> output) {
    parallel_for(output.cols(), product_rows, [&](Index first, Index last) {
        Matrix<float> weight(last - first, states.cols());
        auto decode = decoder();
        for (Index row = first; row < last; ++row) decode(row, weight.row(row - first).data());
        const Matrix<float> part = states * weight.transpose();
        for (Index token = 0; token < states.rows(); ++token)
            for (Index row = first; row < last; ++row)
                put(part(token, row - first), bias, adds, row, output(token, row));
    });
}

}  // namespace

void StoredNumbers::row(Index index, float* target) const {
    Eigen::Map<Eigen::Array<float, 1, Eigen::Dynamic>> to(target, columns);
    const auto widen = [&]<typename Scalar>(Scalar) {
        to = Eigen::Map<const Eigen::Array<Scalar, 1, Eigen::Dynamic>>(
                 static_cast<const Scalar*>(data) + index * columns, columns)
                 .template cast<float>();
    };
    switch (type) {
        case Type::float32:
            return widen(float{});
        case Type::float16:
            return widen(Eigen::half{});
        case Type::bfloat16:
            return widen(Eigen::bfloat16{});
        case Type::int8:
            return widen(std::int8_t{});
        case Type::uint8:
            return widen(std::uint8_t{});
    }
}

void pack_planes(ConstMatrixView<std::uint8_t> codes, int bits, MatrixView<std::uint8_t> planes) {
    parallel_for(codes.rows(), product_grain, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row)
            for (Index start = 0; start < codes.cols(); start += packed_block) {
                std::uint8_t block[packed_block] = {};
                const Index count = std::min(packed_block, codes.cols() - start);
                std::copy_n(codes.data() + row * codes.cols() + start, count, block);
                std::uint8_t* target = planes.data() + row * planes.cols() + start / 8 * bits;
                with_bits(bits, [&]<int b>(std::integral_constant<int, b>) {
                    each_plane<b>(
                        [&]<int width>(std::integral_constant<int, width>, int shift, int byte) {
                            pack_plane<width>(block, shift, target + byte);
                        });
                });
            }
    });
}

void decode_packed(const PackedWeight& packed, MatrixView<float> weight) {
    parallel_for(weight.rows(), product_grain, [&](Index first, Index last) {
        Row row(packed);
        for (Index index = first; index < last; ++index) {
            row.read(index);
            row.decode(weight.row(index).data());
        }
    });
}

void packed_linear(ConstMatrixView<float> states, const PackedWeight& packed, const float* bias,
                   bool adds, MatrixView<float> output) {
    const Index tokens = states.rows(), groups = packed.groups();
    if (tokens > few_tokens) {
        const auto decoder = [&] {
            return [row = Row(packed)](Index index, float* target) mutable {
                row.read(index);
                row.decode(target);
            };
        };
        return tiled_product(states, decoder, bias, adds, output);
    }
    const Index size = packed.channels / groups;
    Matrix<float> sums(tokens, groups);
    for (Index token = 0; token < tokens; ++token)
        for (Index group = 0; group < groups; ++group)
            sums(token, group) = sum(states.row(token).segment(group * size, size));
    parallel_for(output.cols(), product_grain, [&](Index first, Index last) {
        Row row(packed);
        for (Index index = first; index < last; ++index) {
            row.read(index);
            for (Index token = 0; token < tokens; ++token)
                put(row.product(states.row(token).data(), sums.row(token).data()), bias, adds,
                    index, output(token, index));
        }
    });
}

void stored_linear(ConstMatrixView<float> states, const StoredNumbers& weight, const float* bias,
                   bool adds, MatrixView<float> output) {
    const auto decoder = [&] {
        return [&weight](Index index, float* target) { weight.row(index, target); };
    };
    if (states.rows() > few_tokens) return tiled_product(states, decoder, bias, adds, output);
    parallel_for(output.cols(), product_grain, [&](Index first, Index last) {
        AlignedRow<float> row(weight.columns);
        for (Index index = first; index < last; ++index) {
            weight.row(index, row.data());
            for (Index token = 0; token < states.rows(); ++token)
                put(row_product(row.data(), states.row(token).data(), row.size()), bias, adds,
                    index, output(token, index));
        }
    });
}

}  // namespace bitwright
