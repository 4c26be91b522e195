// The double kernels for AVX2 with FMA: see tile.h.
#define FA_SET fa_avx2_f64
#define FA_TYPE "f64"
#define FA_DOUBLE
#include "tile.h"
