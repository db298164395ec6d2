// A sum of parts that threads compute.
#pragma once

#include <vector>

#include "linalg/threads.hpp"

namespace bitwright {

// Σ part(i) for i from 0 to count, in double: computed by pieces of `grain` parts and added in
// order, so that it has the same bits on any threads.
template <typename Part>
double ordered_sum(Index count, Index grain, const Part& part) {
    std::vector<double> parts(static_cast<size_t>(count));
    parallel_for(count, grain, [&](Index first, Index last) {
        for (Index i = first; i < last; ++i) parts[static_cast<size_t>(i)] = part(i);
    });
    double total = 0.0;
    for (const double each : parts) total += each;
    return total;
}

}  // namespace bitwright
