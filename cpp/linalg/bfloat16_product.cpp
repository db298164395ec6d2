#include "linalg/bfloat16_product.hpp"

#include <bit>
#include <cmath>
#include <limits>

#include "linalg/product.hpp"

// Of the modules only the one for AVX-512 can have it: its functions are compiled for one
// instruction more than the rest, and called where the processor has that.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define BITWRIGHT_AVX512_BF16 __attribute__((target("avx512bf16")))
#include <immintrin.h>
#endif

namespace bitwright {
namespace {

using Pair = std::uint32_t;  // two bfloat16 of one lane, the first in the lower half

constexpr Index left_lanes = 8, right_lanes = 48;  // of one tile in registers: 24 of AVX-512's 32
constexpr Index block_pairs = 256;                 // half of the depth that is summed up at a time
constexpr Index strip_lanes = 2048;                // of the left factor that are packed at a time
constexpr Index group = 16;                        // lanes that are packed at a time
static_assert(right_lanes % group == 0 && group % left_lanes == 0);

Index round_up(Index count, Index unit) { return (count + unit - 1) / unit * unit; }

// Where the pair `k` of the 16 lanes from `lane` on is put: in panels of `width` lanes, each with
// its pairs one after another.
Pair* place(Pair* packed, Index width, Index pairs, Index lane, Index k) {
    return packed + (lane / width * pairs + k) * width + lane % width;
}

struct Plain {
    static Pair bits(Eigen::bfloat16 value) {
        return Eigen::numext::bit_cast<std::uint16_t>(value);
    }
    static Pair bits(float value) { return bits(static_cast<Eigen::bfloat16>(value)); }
    static Pair bits(Eigen::half value) { return bits(static_cast<float>(value)); }

    template <typename Scalar>
    static void pack(const ProductFactor<Scalar>& factor, Index first, Index lanes, Index depth,
                     Index count, Index width, Pair* packed) {
        const auto at = [&](Index lane, Index i) -> Pair {
            if (lane >= lanes || i >= count) return 0;
            const Index row = first + lane, column = depth + i;
            return bits(factor.data[factor.lane_by_lane ? row * factor.stride + column
                                                        : column * factor.stride + row]);
        };
        const Index pairs = (count + 1) / 2;
        for (Index lane = 0; lane < round_up(lanes, std::max(width, group)); ++lane)
            for (Index k = 0; k < pairs; ++k)
                *place(packed, width, pairs, lane, k) = at(lane, 2 * k) | at(lane, 2 * k + 1) << 16;
    }

    static float flushed(float value) {
        return std::abs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value)
                                                                   : value;
    }
    static float second(Pair pair) { return flushed(std::bit_cast<float>(pair & 0xffff0000u)); }
    static float first(Pair pair) { return second(pair << 16); }

    static void multiply(Index pairs, const Pair* left, const Pair* right, float* sums) {
        std::fill(sums, sums + left_lanes * right_lanes, 0.0f);
        for (Index k = 0; k < pairs; ++k, left += left_lanes, right += right_lanes)
            for (Index i = 0; i < left_lanes; ++i)
                for (Index j = 0; j < right_lanes; ++j) {
                    float& sum = sums[i * right_lanes + j];
                    sum = flushed(std::fma(second(left[i]), second(right[j]), sum));
                    sum = flushed(std::fma(first(left[i]), first(right[j]), sum));
                }
    }
};

#ifdef BITWRIGHT_AVX512_BF16
struct Avx512 {
    // Of 32 elements the first `count`, rounded, and zeros.
    BITWRIGHT_AVX512_BF16 static __m512i load(const float* data, Index count) {
        const auto low = _mm512_maskz_loadu_ps(mask16(count), data);
        const auto high = _mm512_maskz_loadu_ps(mask16(count - 16), data + 16);
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    BITWRIGHT_AVX512_BF16 static __m512i load(const Eigen::half* data, Index count) {
        const auto low = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask16(count), data));
        const auto high = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask16(count - 16), data + 16));
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    BITWRIGHT_AVX512_BF16 static __m512i load(const Eigen::bfloat16* data, Index count) {
        const auto mask = static_cast<__mmask32>(count < 32 ? (1u << count) - 1 : ~0u);
        return _mm512_maskz_loadu_epi16(mask, data);
    }
    static __mmask16 mask16(Index count) {
        return static_cast<__mmask16>(count < 1 ? 0 : count < 16 ? (1u << count) - 1 : 0xffffu);
    }

    // 16 lanes of 16 pairs each become 16 pairs of 16 lanes each.
    BITWRIGHT_AVX512_BF16 static void transpose(__m512i (&rows)[16]) {
        __m512i other[16];
        for (int i = 0; i < 16; i += 2) {
            other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; ++j) {
                rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + 2 + j]);
                rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + 2 + j]);
            }
        for (int i = 0; i < 16; i += 8)
            for (int j = 0; j < 4; ++j) {
                other[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0x88);
                other[i + 4 + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0xdd);
            }
        for (int j = 0; j < 8; ++j) {
            rows[j] = _mm512_shuffle_i32x4(other[j], other[8 + j], 0x88);
            rows[8 + j] = _mm512_shuffle_i32x4(other[j], other[8 + j], 0xdd);
        }
    }

    BITWRIGHT_AVX512_BF16 static void put(__m512i lanes, Index width, Index pairs, Index lane,
                                          Index k, Pair* packed) {
        if (width >= group) return _mm512_storeu_si512(place(packed, width, pairs, lane, k), lanes);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place(packed, width, pairs, lane, k)),
                            _mm512_castsi512_si256(lanes));
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(place(packed, width, pairs, lane + left_lanes, k)),
            _mm512_extracti64x4_epi64(lanes, 1));
    }

    template <typename Scalar>
    BITWRIGHT_AVX512_BF16 static void pack(const ProductFactor<Scalar>& factor, Index first,
                                           Index lanes, Index depth, Index count, Index width,
                                           Pair* packed) {
        const Index pairs = (count + 1) / 2, all = round_up(lanes, std::max(width, group));
        if (factor.lane_by_lane) {
            for (Index lane = 0; lane < all; lane += group)
                for (Index k = 0; k < pairs; k += 16) {
                    const Index rest = std::min<Index>(32, count - 2 * k);
                    __m512i rows[16];
                    for (int i = 0; i < 16; ++i) {
                        const Index row = std::min(first + lane + i, factor.lanes - 1);
                        rows[i] = load(factor.data + row * factor.stride + depth + 2 * k,
                                       lane + i < lanes ? rest : 0);
                    }
                    transpose(rows);
                    for (Index i = 0; i < std::min<Index>(16, pairs - k); ++i)
                        put(rows[i], width, pairs, lane, k + i, packed);
                }
            return;
        }
        alignas(64) std::uint16_t order[32];
        for (std::uint16_t i = 0; i < 32; ++i)
            order[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 16);
        const __m512i interleaved = _mm512_load_si512(order);
        for (Index k = 0; k < pairs; ++k)
            for (Index lane = 0; lane < all; lane += group) {
                const Index rest = std::clamp<Index>(lanes - lane, 0, group);
                const Scalar* data = factor.data + (depth + 2 * k) * factor.stride + first + lane;
                const auto one = load(data, rest);
                const auto two =
                    2 * k + 1 < count ? load(data + factor.stride, rest) : _mm512_setzero_si512();
                const auto both = _mm512_inserti64x4(one, _mm512_castsi512_si256(two), 1);
                put(_mm512_permutexvar_epi16(interleaved, both), width, pairs, lane, k, packed);
            }
    }

    BITWRIGHT_AVX512_BF16 static void multiply(Index pairs, const Pair* left, const Pair* right,
                                               float* sums) {
        constexpr int wide = right_lanes / group;
        __m512 sum[left_lanes][wide];
        for (auto& row : sum)
            for (auto& each : row) each = _mm512_setzero_ps();
        for (Index k = 0; k < pairs; ++k, left += left_lanes, right += right_lanes) {
            __m512bh columns[wide];
            for (int j = 0; j < wide; ++j)
                columns[j] = (__m512bh)_mm512_loadu_si512(right + j * group);
#pragma GCC unroll 8
            for (int i = 0; i < left_lanes; ++i) {
                const auto row = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[i]));
#pragma GCC unroll 3
                for (int j = 0; j < wide; ++j)
                    sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, columns[j]);
            }
        }
        for (int i = 0; i < left_lanes; ++i)
            for (int j = 0; j < wide; ++j)
                _mm512_storeu_ps(sums + i * right_lanes + j * group, sum[i][j]);
    }
};
#endif

using Packed = Eigen::Array<Pair, Eigen::Dynamic, 1>;

template <typename Kernel, typename Left, typename Right>
void product(const ProductFactor<Left>& left, const ProductFactor<Right>& right, bool accumulate,
             Part part, MatrixView<float>& output) {
    const Index depth = left.depth, block = 2 * block_pairs;
    for (Index strip = 0; strip < left.lanes; strip += strip_lanes) {
        const Index height = std::min(strip_lanes, left.lanes - strip);
        const Index padded = round_up(height, group);
        Packed rows(padded * ((depth + 1) / 2));
        const auto rows_from = [&](Index first, Index k) {
            const Index pairs = std::min(block_pairs, (depth - k + 1) / 2);
            return rows.data() + k / 2 * padded + first * pairs;
        };
        const Index blocks = (depth + block - 1) / block, groups = padded / group;
        parallel_for(blocks * groups, 4, [&](Index begin, Index end) {
            for (Index piece = begin; piece < end; ++piece) {
                const Index k = piece / groups * block, lane = piece % groups * group;
                Kernel::pack(left, strip + lane, std::min(group, height - lane), k,
                             std::min(block, depth - k), left_lanes, rows_from(lane, k));
            }
        });
        const Index width = part == Part::lower ? strip + height : right.lanes;
        Tiling(height, width).each([&](Index row, Index tall, Index column, Index wide) {
            if (part == Part::lower && column >= strip + row + tall) return;
            thread_local Packed columns;
            columns.resize(round_up(wide, right_lanes) * block_pairs);
            alignas(64) float sums[left_lanes * right_lanes];
            for (Index k = 0; k < depth; k += block) {
                const Index count = std::min(block, depth - k), pairs = (count + 1) / 2;
                const bool adds = accumulate || k > 0;
                Kernel::pack(right, column, wide, k, count, right_lanes, columns.data());
                for (Index j = 0; j < wide; j += right_lanes)
                    for (Index i = 0; i < tall; i += left_lanes) {
                        const Index top = strip + row + i, first = column + j;
                        const Index below = std::min(left_lanes, tall - i);
                        if (part == Part::lower && first >= top + below) continue;
                        Kernel::multiply(pairs, rows_from(row + i, k), columns.data() + j * pairs,
                                         sums);
                        for (Index r = 0; r < below; ++r) {
                            Index beside = std::min(right_lanes, wide - j);
                            if (part == Part::lower) beside = std::min(beside, top + r + 1 - first);
                            float* target = output.data() + (top + r) * output.cols() + first;
                            const float* source = sums + r * right_lanes;
                            if (adds)
                                for (Index c = 0; c < beside; ++c) target[c] += source[c];
                            else
                                for (Index c = 0; c < beside; ++c) target[c] = source[c];
                        }
                    }
            }
        });
    }
    if (depth == 0 && !accumulate) output.setZero();
}

}  // namespace

bool multiplies_bfloat16() {
#ifdef BITWRIGHT_AVX512_BF16
    static const bool has = __builtin_cpu_supports("avx512bf16") != 0;
    return has;
#else
    return false;
#endif
}

template <typename Left, typename Right>
void bfloat16_product(ProductFactor<Left> left, ProductFactor<Right> right, bool accumulate,
                      Part part, bool plain, MatrixView<float> output) {
#ifdef BITWRIGHT_AVX512_BF16
    if (!plain && multiplies_bfloat16())
        return product<Avx512>(left, right, accumulate, part, output);
#endif
    (void)plain;
    product<Plain>(left, right, accumulate, part, output);
}

#define BITWRIGHT_BFLOAT16_PRODUCT(Right)                                                        \
    template void bfloat16_product(ProductFactor<float>, ProductFactor<Right>, bool, Part, bool, \
                                   MatrixView<float>);
BITWRIGHT_BFLOAT16_PRODUCT(float)
BITWRIGHT_BFLOAT16_PRODUCT(Eigen::half)
BITWRIGHT_BFLOAT16_PRODUCT(Eigen::bfloat16)

}  // namespace bitwright
