// The double kernels for AVX-512: see tile.h.
#define FA_SET fa_avx512_f64
#define FA_TYPE "f64"
#define FA_DOUBLE
#include "tile.h"
