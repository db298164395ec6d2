// Weights to vectors of a codebook: round-to-nearest, GPTQ, and refinement. Codes are those of
// single weights, see CodebookType.
#pragma once

#include "quant/codebook_types.hpp"

namespace bitwright {

// The scales [out, groups], each fitted to its group by itself, with the least Σ importance (weight
// − decoded)² among some; without `search` those that just span the largest weight.
void vector_scales(ConstMatrixView<float> weight, ConstVectorView<float> importance,
                   const CodebookType& type, bool search, MatrixView<float> scales);

// Codes [out, in]: the vectors nearest to `weight` [out, in] under scales [out, groups].
void encode_vectors(ConstMatrixView<float> weight, ConstMatrixView<float> scales,
                    ConstVectorView<float> importance, const CodebookType& type,
                    MatrixView<std::uint8_t> codes);

// Whether an order of columns keeps units together.
bool are_units(ConstVectorView<std::int32_t> order);

// GPTQ as in quantize.hpp, unit by unit: a unit's vectors are chosen together, in the metric of
// what they cost once all later columns have made up for them. The codes that `codes` holds say
// the direction of groups that are moved as a whole; those of groups with a scale of 0 stay.
void quantize_vectors(ConstMatrixView<float> weight, ConstMatrixView<float> upper,
                      ConstVectorView<std::int32_t> order, ConstMatrixView<float> scales,
                      const CodebookType& type, Index block, MatrixView<std::uint8_t> codes,
                      VectorView<double> losses);

// Coordinate descent on tr((W − Ŵ) gram (W − Ŵ)ᵀ), as stored: in each round, superblock by
// superblock, its d, the scale of each of its groups, and each unit's vectors take their best value
// given all others. `objectives` [rounds + 1] receives its value before and after every round.
void refine_vectors(ConstMatrixView<float> weight, ConstMatrixView<float> gram,
                    const CodebookType& type, Index rounds, MatrixView<std::uint8_t> codes,
                    SuperblocksView grids, VectorView<double> objectives);

}  // namespace bitwright
