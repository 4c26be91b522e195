// The bfloat16 dot product kernels for AVX-512 with bf16: see tile.h.
#define FA_SET fa_avx512_bf16_bf16
#define FA_TYPE "bf16"
#define FA_BF16_PAIRS
#include "tile.h"
