// The bfloat16 kernels for AMX, with AVX-512 around them: see tile.h, amx.h.
#define FA_SET fa_amx_bf16
#define FA_TYPE "bf16"
#define FA_BF16_PAIRS
#define FA_AMX
#define FA_BR 512
#define FA_BC 512
#define FA_BR_BACKWARD 128
#define FA_BC_BACKWARD 128
#include "tile.h"
