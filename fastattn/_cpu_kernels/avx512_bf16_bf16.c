// The bfloat16 dot product kernels for AVX-512 with bf16: see tile.h.
#define FA_SET fa_avx512_bf16_bf16
#define FA_TYPE "bf16"
#define FA_BF16_PAIRS
#define FA_BR 128
#define FA_BC 128
#define FA_BR_BACKWARD 96
#define FA_BC_BACKWARD 128
#define FA_SCORES_MR 8
#define FA_ACCUMULATE_NR 4
#include "tile.h"
