// One pool of threads for the whole extension. BLAS has none: a product is shared out among these
// threads as well, see product.hpp.
#pragma once

#include <functional>

#include "linalg/matrix.hpp"

namespace bitwright {

int num_threads();
void set_num_threads(int threads);  // from 1 to 1024

// Calls body(begin, end) over disjoint pieces of at most `grain` items that together cover [0,
// count). Pieces are taken by whichever thread is free; a body must therefore write only to its own
// items. Called from inside another parallel_for, or while another Python thread runs one, it stays
// serial.
void parallel_for(Index count, Index grain, const std::function<void(Index, Index)>& body);

const char* blas_name();  // OpenBLAS' own description of its build and kernels, or "system"

}  // namespace bitwright
