// The double kernels for any machine: see tile.h.
#define FA_SET fa_portable_f64
#define FA_TYPE "f64"
#define FA_DOUBLE
#define FA_BR 128
#define FA_BC 128
#define FA_BR_BACKWARD 96
#define FA_BC_BACKWARD 128
#define FA_SCORES_MR 6
#define FA_ACCUMULATE_NR 2
#include "tile.h"
