// The float kernels for AVX2 with FMA: see tile.h.
#define FA_SET fa_avx2_f32
#define FA_TYPE "f32"
#include "tile.h"
