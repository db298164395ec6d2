#include "linalg/inner_product.hpp"

#include <algorithm>

#include "linalg/ordered_sum.hpp"
#include "linalg/sum.hpp"

namespace bitwright {

// In leaves of a fixed length, whose sums are added in order: the same bits on any threads, which
// NumPy's own inner product does not have.
double inner_product(ConstMatrixView<float> a, ConstMatrixView<float> b) {
    constexpr Index leaf = 1 << 14;
    const ConstVectorView<float> left(a.data(), a.size()), right(b.data(), b.size());
    return ordered_sum((a.size() + leaf - 1) / leaf, 1, [&](Index part) {
        const Index start = part * leaf, count = std::min(leaf, a.size() - start);
        return dot(left.segment(start, count), right.segment(start, count));
    });
}

}  // namespace bitwright
