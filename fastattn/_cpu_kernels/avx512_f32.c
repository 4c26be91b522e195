// The float kernels for AVX-512: see tile.h.
#define FA_SET fa_avx512_f32
#define FA_TYPE "f32"
#include "tile.h"
