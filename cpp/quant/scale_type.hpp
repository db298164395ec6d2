// The dtypes that scales and biases are stored in, and how numbers are rounded to them.
#pragma once

#include <algorithm>
#include <cmath>

#include "linalg/matrix.hpp"

namespace bitwright {

enum class ScaleType { float32, float16, bfloat16, e8m0, e4m3 };

constexpr int lane_count = 16;
using Lanes = Eigen::Array<float, lane_count, 1>;

// To the nearest power of two from 2^−127 to 2^127; a tie goes up, and zero stays zero.
inline float round_to_e8m0(float value) {
    if (!(value > 0.0f)) return 0.0f;
    int exponent = 0;
    const float mantissa = std::frexp(value, &exponent);  // in [0.5, 1)
    return std::ldexp(1.0f, std::clamp(mantissa >= 0.75f ? exponent : exponent - 1, -127, 127));
}

// To the nearest number with three bits after the point, up to 448; ties go to even.
inline float round_to_e4m3(float value) {
    constexpr int least_exponent = -6, bits = 3;
    constexpr float largest = 448.0f;
    if (!(std::abs(value) > 0.0f)) return 0.0f;
    const int exponent = std::max(std::ilogb(value), least_exponent);
    const float rounded =
        std::ldexp(std::rint(std::ldexp(value, bits - exponent)), exponent - bits);
    return std::clamp(rounded, -largest, largest);
}

inline Lanes round_to(ScaleType type, const Lanes& values) {
    switch (type) {
        case ScaleType::float16:
            return values.cast<Eigen::half>().cast<float>();
        case ScaleType::bfloat16:
            return values.cast<Eigen::bfloat16>().cast<float>();
        case ScaleType::e8m0:
            return values.unaryExpr(&round_to_e8m0);
        case ScaleType::e4m3:
            return values.unaryExpr(&round_to_e4m3);
        default:
            return values;
    }
}

// Whether scales are few: powers of two, or those with three bits after the point.
inline bool has_few_scales(ScaleType type) {
    return type == ScaleType::e8m0 || type == ScaleType::e4m3;
}

// The smallest number above zero that the dtype holds, a subnormal one: no scale is less, since
// codes are quotients by it.
inline float smallest_scale(ScaleType type) {
    switch (type) {
        case ScaleType::float16:
            return 0x1p-24f;
        case ScaleType::bfloat16:
            return 0x1p-133f;
        case ScaleType::e8m0:
            return 0x1p-127f;
        case ScaleType::e4m3:
            return 0x1p-9f;
        default:
            return 0x1p-149f;
    }
}

inline float round_to(ScaleType type, float value) {
    return round_to(type, Lanes::Constant(value))[0];
}

// The smallest number of full precision: the scale of groups whose weights are all the same, for
// which any would do.
inline float smallest_normal(ScaleType type) {
    return type == ScaleType::float16 ? 0x1p-14f : 0x1p-126f;
}

}  // namespace bitwright
