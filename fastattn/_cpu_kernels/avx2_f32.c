// The float kernels for AVX2 with FMA: see tile.h.
#define FA_SET fa_avx2_f32
#define FA_TYPE "f32"
#define FA_BR 128
#define FA_BC 128
#define FA_BR_BACKWARD 96
#define FA_BC_BACKWARD 128
#define FA_SCORES_MR 6
#define FA_ACCUMULATE_NR 2
#include "tile.h"
