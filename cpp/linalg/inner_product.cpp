#include "linalg/inner_product.hpp"

#include <algorithm>
#include <vector>

#include "linalg/sum.hpp"
#include "linalg/threads.hpp"

namespace bitwright {

// In leaves of a fixed length, whose sums are added in order: the same bits on any threads, which
// NumPy's own inner product does not have.
double inner_product(ConstMatrixView<float> a, ConstMatrixView<float> b) {
    constexpr Index leaf = 1 << 14;
    const ConstVectorView<float> left(a.data(), a.size()), right(b.data(), b.size());
    std::vector<double> parts(static_cast<size_t>((a.size() + leaf - 1) / leaf));
    parallel_for(static_cast<Index>(parts.size()), 1, [&](Index first, Index last) {
        for (Index part = first; part < last; ++part) {
            const Index start = part * leaf, count = std::min(leaf, a.size() - start);
            parts[static_cast<size_t>(part)] =
                dot(left.segment(start, count), right.segment(start, count));
        }
    });
    double total = 0.0;
    for (const double part : parts) total += part;
    return total;
}

}  // namespace bitwright
