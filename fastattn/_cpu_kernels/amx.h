// scores, accumulate and peak of tile.h by AMX: products of tiles of 16 rows x 64 bytes, which lie
// in registers of their own.
//
//     C[16][16 reals] += A[16][16 units] B[16 units][16]
//
// Left operands are A as they lie; lanes and right operands, whose units are pairs along the summed
// axis, are B. P lies [key pair][query] where queries are its rows, and is transposed first.
//
// Bits: an instruction adds up the first and the second halves of its units apart, and both to C.
// So what is summed is cut into the same runs of 16 units wherever a product starts: the summed
// axis of scores starts at 0, and of accumulate at a multiple of FA_RUN keys or of 16 units.
// No chain is longer than 16 multiply-adds; CHAIN is not needed.
#include <immintrin.h>

#define RUN_UNITS 16  // of one instruction; also its rows and columns
_Static_assert(FA_RUN % (RUN_UNITS * PAIR) == 0, "a run of keys is whole instructions");

// The registers: two of C, and the operands of whole runs and of what is left at the end.
#define C0 0
#define C1 1
#define A_RUN 2
#define B0_RUN 3
#define B1_RUN 4
#define A_REST 5
#define B0_REST 6
#define B1_REST 7

// C and A get that many rows; what is left of the summed axis at the end that many units.
static void tiles_configure(int rows, int rest) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    const int shape[8][2] = {
        [C0] = {rows, RUN_UNITS},       [C1] = {rows, RUN_UNITS},
        [A_RUN] = {rows, RUN_UNITS},    [A_REST] = {rows, rest},
        [B0_RUN] = {RUN_UNITS, RUN_UNITS}, [B0_REST] = {rest, RUN_UNITS},
        [B1_RUN] = {RUN_UNITS, RUN_UNITS}, [B1_REST] = {rest, RUN_UNITS},
    };
    for (int t = 0; t < 8; t++)
        if (shape[t][0] && shape[t][1]) {
            config.rows[t] = (uint8_t)shape[t][0];
            config.row_bytes[t] = (uint16_t)(shape[t][1] * sizeof(unit));
        }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));  // GCC knows of _tile_loadconfig that it reads 8 bytes
}

// Registers are named in the instructions themselves: a function cannot take them.
#define MULTIPLY(A, B0, B1)                        \
    do {                                           \
        _tile_loadd(A, a, a_bytes);                \
        _tile_loadd(B0, b, b_bytes);               \
        _tile_dpbf16ps(C0, A, B0);                 \
        if (vectors == 2) {                        \
            _tile_loadd(B1, b + V_LANES, b_bytes); \
            _tile_dpbf16ps(C1, A, B1);             \
        }                                          \
    } while (0)

// C[..][1 or 2 vectors] = A B, or that added to C; A's next run of units is a_run further.
INLINE void tiles_product(real *c, ptrdiff_t ldc, int vectors, const unit *a, ptrdiff_t a_row,
                          ptrdiff_t a_run, const unit *b, ptrdiff_t ldb, int depth, int add) {
    const ptrdiff_t c_bytes = ldc * (ptrdiff_t)sizeof(real);
    const ptrdiff_t a_bytes = a_row * (ptrdiff_t)sizeof(unit);
    const ptrdiff_t b_bytes = ldb * (ptrdiff_t)sizeof(unit);
    __asm__ volatile("" ::: "memory");  // GCC does not know that _tile_loadd reads memory
    if (add) {
        _tile_loadd(C0, c, c_bytes);
        if (vectors == 2) _tile_loadd(C1, c + V_LANES, c_bytes);
    } else {
        _tile_zero(C0);
        _tile_zero(C1);
    }
    for (; depth >= RUN_UNITS; depth -= RUN_UNITS) {
        MULTIPLY(A_RUN, B0_RUN, B1_RUN);
        a += a_run;
        b += RUN_UNITS * ldb;
    }
    if (depth > 0) MULTIPLY(A_REST, B0_REST, B1_REST);
    _tile_stored(C0, c, c_bytes);
    if (vectors == 2) _tile_stored(C1, c + V_LANES, c_bytes);
}

static void scores(void *s_, int panel, const void *k_, ptrdiff_t ldk, int in_place, const void *q,
                   int keys, int depth, const uint32_t *keep, const fa_adjust *how, void *tile_max) {
    (void)in_place;
    if (how) fetch_terms(how, 0, keys, keys);
    real *s = s_;
    const unit *k = k_;
    for (int row = 0; row < keys; row += RUN_UNITS) {
        int rows = keys - row < RUN_UNITS ? keys - row : RUN_UNITS;
        if (row == 0 || rows < RUN_UNITS) tiles_configure(rows, depth % RUN_UNITS);
        tiles_product(s + (ptrdiff_t)row * panel, panel, panel / V_LANES, k + row * ldk, ldk,
                      RUN_UNITS, q, panel, depth, 0);
    }
    _tile_release();
    finish_scores(s, panel, keys, keep, how, tile_max);
}

// dst[row][unit], RUN_UNITS of both, from units that lie `ld` apart; zeros past `rows` and `n`.
static void transpose_units(unit *dst, const unit *a, ptrdiff_t ld, int rows, int n) {
    vr block[V_LANES];
    const __mmask16 in_rows = (__mmask16)((1u << rows) - 1);
    for (int d = 0; d < RUN_UNITS; d++)
        block[d] = d < n ? (vr)_mm512_maskz_loadu_epi32(in_rows, a + d * ld) : (vr){};
    v_transpose(block);
    for (int row = 0; row < RUN_UNITS; row++) v_store((real *)(dst + row * RUN_UNITS), block[row]);
}

#define LEFT_RUNS 8  // of a transposed left operand at a time

static void accumulate(const fa_product *x) {
    unit left[LEFT_RUNS * RUN_UNITS * RUN_UNITS] __attribute__((aligned(64)));
    const unit *a = x->a, *b = x->b;
    const real *alpha = x->alpha;
    int configured[2] = {0, 0};
    for (int row = 0; row < x->rows; row += RUN_UNITS) {
        int rows = x->rows - row < RUN_UNITS ? x->rows - row : RUN_UNITS, start = 0, end = x->depth;
        real *c = (real *)x->c + row * x->ldc;
        fetch_some(x->fetch, x->fetches, (rows + ACCUMULATE_MR - 1) / ACCUMULATE_MR * x->fetch_rows);
        if (x->row_end) {
            end = 0;
            for (int i = row; i < row + rows; i++) end = x->row_end[i] > end ? x->row_end[i] : end;
        }
        if (x->row_start) {
            start = end;
            for (int i = row; i < row + rows; i++)
                start = x->row_start[i] < start ? x->row_start[i] : start;
            start = start / RUN_UNITS * RUN_UNITS;
        }
        if (alpha)
            for (int i = 0; i < rows; i++)
                for (int col = 0; col < x->cols; col += V_LANES) {
                    real *at = c + i * x->ldc + col;
                    v_storeu(at, v_loadu(at) * v_set1(alpha[row + i]));
                }
        while (start < end) {
            int n = end - start < LEFT_RUNS * RUN_UNITS ? end - start : LEFT_RUNS * RUN_UNITS;
            const unit *from = a + row * x->a_row + start * x->a_depth;
            ptrdiff_t a_row = x->a_row, a_run = RUN_UNITS;
            if (x->a_depth != 1) {
                for (int d = 0; d < n; d += RUN_UNITS)
                    transpose_units(left + d * RUN_UNITS, from + d * x->a_depth, x->a_depth, rows,
                                    n - d);
                from = left;
                a_row = RUN_UNITS;
                a_run = RUN_UNITS * RUN_UNITS;
            }
            if (configured[0] != rows || configured[1] != n % RUN_UNITS)
                tiles_configure(configured[0] = rows, configured[1] = n % RUN_UNITS);
            for (int col = 0; col < x->cols; col += 2 * V_LANES)
                tiles_product(c + col, x->ldc, x->cols - col > V_LANES ? 2 : 1, from, a_row, a_run,
                              b + start * x->ldb + col, x->ldb, n, 1);
            start += n;
        }
    }
    _tile_release();
}

// Four products at a time, each of which waits for its own last one only.
static double peak(int64_t iterations, double *sink) {
    unit zeros[RUN_UNITS * RUN_UNITS] __attribute__((aligned(64))) = {0};
    real c[RUN_UNITS * RUN_UNITS] __attribute__((aligned(64)));
    tiles_configure(RUN_UNITS, RUN_UNITS);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    __asm__ volatile("" ::: "memory");
    _tile_loadd(4, zeros, sizeof(unit) * RUN_UNITS);
    _tile_loadd(5, zeros, sizeof(unit) * RUN_UNITS);
    for (int64_t n = 0; n < iterations; n++) {
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 5);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, c, sizeof(real) * RUN_UNITS);
    _tile_release();
    *sink += (double)c[0];
    return (double)iterations * 4 * RUN_UNITS * RUN_UNITS * RUN_UNITS * PAIR * 2;
}
