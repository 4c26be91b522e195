// The bfloat16 kernels for AMX, with AVX-512 around them: see tile.h, amx.h.
#define FA_SET fa_amx_bf16
#define FA_TYPE "bf16"
#define FA_BF16_PAIRS
#define FA_AMX
// v is packed transposed for each block of rows, and what begins and ends a tile takes longer than
// by vectors: both weigh less the larger the tile (from 128 keys to 512, a fifth).
#define FA_BR 512
#define FA_BC 512
#define FA_BR_BACKWARD 128
#define FA_BC_BACKWARD 128
#include "tile.h"
