// The double kernels for any machine: see tile.h.
#define FA_SET fa_portable_f64
#define FA_TYPE "f64"
#define FA_DOUBLE
#include "tile.h"
