// The double kernels for AVX-512: see tile.h.
#define FA_SET fa_avx512_f64
#define FA_TYPE "f64"
#define FA_DOUBLE
#define FA_BR 128
#define FA_BC 128
#define FA_BR_BACKWARD 96
#define FA_BC_BACKWARD 128
#define FA_SCORES_MR 8
#define FA_ACCUMULATE_NR 4
#include "tile.h"
