// One pool of threads for the whole extension: our own loops and OpenBLAS run on it in turn, so
// that no idle BLAS thread spins on a core that a loop needs, and the other way round.
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

// While one is alive BLAS calls stay on the thread that makes them: for bodies of parallel_for.
class SerialBlas {
  public:
    SerialBlas();
    ~SerialBlas();
    SerialBlas(const SerialBlas&) = delete;
    SerialBlas& operator=(const SerialBlas&) = delete;
};

const char* blas_name();  // OpenBLAS' own description of its build and kernels, or "system"

}  // namespace bitwright
