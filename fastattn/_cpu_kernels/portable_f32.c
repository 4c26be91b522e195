// The float kernels for any machine: see tile.h.
#define FA_SET fa_portable_f32
#define FA_TYPE "f32"
#include "tile.h"
