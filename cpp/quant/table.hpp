// A grid whose points are a table: w = s·T[c], the points sorted, and s of either sign or not.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "quant/scale_type.hpp"

namespace bitwright {

constexpr int most_points = 256;

// The points of all groups, and where one takes over from the next. `bounds` decides about ties,
// too: what is more than bounds[c] is nearer to point c + 1, and a tie that goes up has a bound
// just below it.
struct Table {
    int count = 0;  // a power of two
    bool either_sign = false;
    float divisor = 1.0f;  // of all stored scales
    std::array<float, most_points> points{};
    std::array<float, most_points> bounds{};  // as many as points less one; the last is infinity

    float encode(float value) const {
        int code = 0;
        for (int half = count / 2; half > 0; half /= 2)
            if (value > bounds[static_cast<size_t>(code + half - 1)]) code += half;
        return static_cast<float>(code);
    }
    float decode(float code) const { return points[static_cast<size_t>(static_cast<int>(code))]; }

    // Of few points, all bounds are compared at once, which no lane waits for.
    Lanes encode(const Lanes& values) const {
        constexpr int few = 16;
        Lanes codes = Lanes::Zero();
        if (count > few) {
            for (int lane = 0; lane < lane_count; ++lane) codes[lane] = encode(values[lane]);
            return codes;
        }
        for (int bound = 0; bound + 1 < count; ++bound)
            codes +=
                (values > bounds[static_cast<size_t>(bound)]).select(Lanes::Ones(), Lanes::Zero());
        return codes;
    }
    Lanes decode(const Lanes& codes) const {
        Lanes values;
        for (int lane = 0; lane < lane_count; ++lane) values[lane] = decode(codes[lane]);
        return values;
    }

    Lanes stored_scale(ScaleType type, const Lanes& scale) const {
        return round_to(type, scale * divisor) / divisor;
    }

    // The scale of one sign that just spans [low, high]; 0 where there is no range.
    Lanes spanning_scale(const Lanes& low, const Lanes& high, bool negative) const {
        const float top = points[static_cast<size_t>(count - 1)], bottom = points[0];
        const Lanes above = high / (negative ? -bottom : top);
        const Lanes below = low / (negative ? -top : bottom);
        const Lanes needed = (above > below).select(above, below);
        const Lanes spanning = (needed > 0.0f).select(needed, 0.0f);
        return negative ? Lanes(-spanning) : spanning;
    }
};

// A scale of 0 is that of zeros only.
struct TableLanes {
    Lanes scale = Lanes::Zero();
    const Table* table = nullptr;

    Lanes encode(const Lanes& weight, float) const {
        return table->encode((scale == 0.0f).select(Lanes::Zero(), weight / scale));
    }
    Lanes decode(const Lanes& code) const { return scale * table->decode(code); }

    float encode(Index lane, float weight, float) const {
        return table->encode(scale[lane] == 0.0f ? 0.0f : weight / scale[lane]);
    }
    float decode(Index lane, float code) const { return scale[lane] * table->decode(code); }
};

}  // namespace bitwright
