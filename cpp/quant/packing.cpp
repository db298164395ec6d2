#include "quant/packing.hpp"

#include "linalg/threads.hpp"

namespace bitwright {

void pack(ConstMatrixView<std::uint8_t> codes, int bits, MatrixView<std::uint32_t> words) {
    parallel_for(codes.rows(), 16, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            const std::uint8_t* code = codes.data() + row * codes.cols();
            std::uint32_t* word = words.data() + row * words.cols();
            std::uint64_t stream = 0;
            int filled = 0;
            for (Index i = 0; i < codes.cols(); ++i) {
                stream |= static_cast<std::uint64_t>(code[i]) << filled;
                filled += bits;
                if (filled >= 32) {
                    *word++ = static_cast<std::uint32_t>(stream);
                    stream >>= 32;
                    filled -= 32;
                }
            }
        }
    });
}

void unpack(ConstMatrixView<std::uint32_t> words, int bits, MatrixView<std::uint8_t> codes) {
    const std::uint64_t mask = (1u << bits) - 1;
    parallel_for(codes.rows(), 16, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            const std::uint32_t* word = words.data() + row * words.cols();
            std::uint8_t* code = codes.data() + row * codes.cols();
            std::uint64_t stream = 0;
            int filled = 0;
            for (Index i = 0; i < codes.cols(); ++i) {
                if (filled < bits) {
                    stream |= static_cast<std::uint64_t>(*word++) << filled;
                    filled += 32;
                }
                code[i] = static_cast<std::uint8_t>(stream & mask);
                stream >>= bits;
                filled -= bits;
            }
        }
    });
}

std::uint8_t largest_code(ConstMatrixView<std::uint8_t> codes) {
    return codes.size() == 0 ? 0 : codes.maxCoeff();
}

}  // namespace bitwright
