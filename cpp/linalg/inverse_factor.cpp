#include "linalg/inverse_factor.hpp"

#include <algorithm>

#include "linalg/cholesky.hpp"
#include "linalg/threads.hpp"

namespace bitwright {

// GPTQ (arXiv:2210.17323) takes the Cholesky factor of an inverse: Cholesky, inverse, Cholesky.
// With J the matrix that reverses the order of the columns and J(G + D)J = LLᵀ,
//     (G + D)⁻¹ = J L⁻ᵀ L⁻¹ J = (J L⁻¹ J)ᵀ (J L⁻¹ J),
// so U = J L⁻¹ J: one Cholesky factorization and one triangular inverse. Reversing both orders of a
// contiguous matrix is reversing its storage.
bool inverse_factor(ConstMatrixView<float> gram, ConstVectorView<std::int32_t> order, float damping,
                    MatrixView<float> upper) {
    const Index size = gram.rows();
    parallel_for(size, 16, [&](Index first, Index last) {
        for (Index i = first; i < last; ++i) {
            const float* row = gram.data() + order[size - 1 - i] * size;
            float* reversed = upper.data() + i * size;
            for (Index j = 0; j <= i; ++j) reversed[j] = row[order[size - 1 - j]];
            std::fill(reversed + i + 1, reversed + size, 0.0f);
            reversed[i] += reversed[i] == 0.0f ? 1.0f : damping;
        }
    });
    if (!cholesky_factor(upper)) return false;
    invert_lower(upper);
    std::reverse(upper.data(), upper.data() + upper.size());
    return upper.diagonal().allFinite();
}

}  // namespace bitwright
