// scores, accumulate and peak of tile.h by AMX: products of tiles of 16 rows x 64 bytes, which lie
// in registers of their own.
//
//     C[16][16 reals] += A[16][16 units] B[16 units][16]
//
// two by two: C[32][32]. Left operands are A as they lie; lanes and right operands, whose units are
// pairs along the summed axis, are B.
//
// The forward's sums are kept turned, so that P is B as softmax leaves it:
//
//     O^T[dv][lane] += V^T[dv][key pair] P[key pair][lane]     accumulate_turned
//
// V^T is packed in tiles, once for all the rows of a block. In other products P, where queries are
// its rows, is transposed first. Few rows of q wait for memory, not for products: theirs are left to
// vectors, which take v as it lies.
//
// Bits: an instruction adds up the first and the second halves of its units apart, and both to C.
// So what is summed is cut into the same runs of 16 units wherever a product starts: the summed
// axis of scores starts at 0, and of accumulate at a multiple of FA_RUN keys or of 16 units.
// No chain is longer than 16 multiply-adds; CHAIN is not needed.
#include <immintrin.h>

#define RUN_UNITS 16  // of one instruction; also its rows and columns
#define TILE_UNITS (RUN_UNITS * RUN_UNITS)
_Static_assert(FA_RUN == RUN_UNITS * PAIR && SCORES_STEP == RUN_UNITS, "whole instructions");

// The registers: 0 to 3 of C, 4 and 5 of A, 6 and 7 of B, all of whole tiles. To shape them takes as
// long as ten products.
static void enter(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.rows[t] = RUN_UNITS;
        config.row_bytes[t] = RUN_UNITS * sizeof(unit);
    }
    // _tile_loadconfig tells GCC 12 of the first eight bytes only, and it drops stores to the rest.
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
static void leave(void) { _tile_release(); }

// GCC does not know that _tile_loadd reads memory.
#define STORES_DONE() __asm__ volatile("" ::: "memory")

// Where a tile is loaded from.
typedef struct {
    const void *at;
    ptrdiff_t step;
} tile_source;

// The tile at p, or a copy with zeros past the given rows and words of a row.
INLINE tile_source whole_tile(uint32_t *copy, const void *p, ptrdiff_t ld, int rows, int words) {
    if (rows >= RUN_UNITS && words >= RUN_UNITS) return (tile_source){p, ld * 4};
    const uint32_t *from = p;
    const __mmask16 in = words < RUN_UNITS ? (__mmask16)((1u << words) - 1) : 0xffff;
    STORES_DONE();  // not before the last tile was loaded from the copy
    for (int r = 0; r < RUN_UNITS; r++)
        _mm512_store_si512(copy + r * RUN_UNITS, r < rows ? _mm512_maskz_loadu_epi32(in, from + r * ld)
                                                          : _mm512_setzero_si512());
    STORES_DONE();
    return (tile_source){copy, 64};
}

// C[tall][wide] tiles = A B, or that added to C.
typedef struct {
    real *c;
    ptrdiff_t ldc;
    const unit *a, *b;
    ptrdiff_t a_row, a_next, a_run;  // from a row, a tile of 16 rows, a run of units to the next
    ptrdiff_t b_row, b_run;
    ptrdiff_t ahead;                 // to what is wanted soon of A
    int rows, depth;                 // rows of A, and with `edges` of C too; units
    int add;
} tiles_product;

// Registers are named in the instructions themselves: a function cannot take them.
#define TILES_OF_C(DO)                     \
    DO(0, x->c, 0)                         \
    if (wide) DO(1, x->c + V_LANES, 0)     \
    if (tall) DO(2, x->c + RUN_UNITS * x->ldc, 1) \
    if (tall && wide) DO(3, x->c + RUN_UNITS * x->ldc + V_LANES, 1)
#define LOAD_C(T, P, BELOW)                                                              \
    {                                                                                    \
        tile_source from = whole_tile(copy, P, x->ldc, x->rows - BELOW * RUN_UNITS, 16); \
        _tile_loadd(T, from.at, from.step);                                              \
    }
#define STORE_C(T, P, BELOW)                                                              \
    {                                                                                     \
        int rows = x->rows - BELOW * RUN_UNITS;                                           \
        if (!edges || rows >= RUN_UNITS) {                                                \
            _tile_stored(T, P, x->ldc * (ptrdiff_t)sizeof(real));                         \
        } else {                                                                          \
            _tile_stored(T, copy, 64);                                                    \
            for (int r = 0; r < rows; r++)                                                \
                v_storeu((P) + r * x->ldc, v_load((const real *)copy + r * V_LANES));     \
        }                                                                                 \
    }
INLINE void multiply_tiles(const int tall, const int wide, const int edges, const tiles_product *x) {
    uint32_t copy[TILE_UNITS] __attribute__((aligned(64)));
    const unit *a = x->a, *b = x->b;
    STORES_DONE();
    if (x->add) {
        TILES_OF_C(LOAD_C)
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int n = x->depth; n > 0; n -= RUN_UNITS) {
        tile_source from = whole_tile(copy, a, x->a_row, x->rows, n);
        _tile_loadd(4, from.at, from.step);
        from = whole_tile(copy, b, x->b_row, n, RUN_UNITS);
        _tile_loadd(6, from.at, from.step);
        _tile_dpbf16ps(0, 4, 6);
        if (wide) {
            from = whole_tile(copy, b + V_LANES, x->b_row, n, RUN_UNITS);
            _tile_loadd(7, from.at, from.step);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (tall) {
            from = whole_tile(copy, a + x->a_next, x->a_row, x->rows - RUN_UNITS, n);
            _tile_loadd(5, from.at, from.step);
            _tile_dpbf16ps(2, 5, 6);
            if (wide) _tile_dpbf16ps(3, 5, 7);
        }
        if (!edges)
            for (int r = 0; r < RUN_UNITS; r++) {
                _mm_prefetch(a + x->ahead + r * x->a_row, _MM_HINT_T0);
                if (tall) _mm_prefetch(a + x->ahead + x->a_next + r * x->a_row, _MM_HINT_T0);
            }
        a += x->a_run;
        b += x->b_run;
    }
    TILES_OF_C(STORE_C)
}
#define DEFINE_TILES(name, tall, wide, edges) \
    NOINLINE void name(const tiles_product *x) { multiply_tiles(tall, wide, edges, x); }
DEFINE_TILES(tiles_1x1, 0, 0, 0)
DEFINE_TILES(tiles_1x2, 0, 1, 0)
DEFINE_TILES(tiles_2x1, 1, 0, 0)
DEFINE_TILES(tiles_2x2, 1, 1, 0)
DEFINE_TILES(edge_tiles_1x1, 0, 0, 1)
DEFINE_TILES(edge_tiles_1x2, 0, 1, 1)
DEFINE_TILES(edge_tiles_2x1, 1, 0, 1)
DEFINE_TILES(edge_tiles_2x2, 1, 1, 1)
typedef void tiles_fn(const tiles_product *x);
static tiles_fn *const tiles_of[2][2] = {{tiles_1x1, tiles_1x2}, {tiles_2x1, tiles_2x2}};
static tiles_fn *const edge_tiles_of[2][2] = {{edge_tiles_1x1, edge_tiles_1x2},
                                              {edge_tiles_2x1, edge_tiles_2x2}};

INLINE vr highest(vr top, const real *s, int panel, int keys) {
    vr other = top;
    for (int key = 0; key + 1 < keys; key += 2) {
        top = v_max(top, v_load(s + key * panel));
        other = v_max(other, v_load(s + (key + 1) * panel));
    }
    if (keys % 2) top = v_max(top, v_load(s + (keys - 1) * panel));
    return v_max(top, other);
}

// The last tile of s may have rows past the last key.
static void scores(void *s_, int panel, const void *k_, ptrdiff_t ldk, int in_place, const void *q,
                   int keys, int depth, const uint32_t *keep, const fa_adjust *how, void *tile_max) {
    (void)in_place;
    if (how) fetch_terms(how, 0, keys, keys);
    const int wide = panel > V_LANES, later = keep || how;
    real *s = s_;
    const unit *k = k_;
    vr top[2] = {v_set1(-INFINITY), v_set1(-INFINITY)};
    tiles_product x = {.ldc = panel, .b = q, .a_row = ldk, .a_next = RUN_UNITS * ldk, .a_run = RUN_UNITS,
                       .b_row = panel, .b_run = (ptrdiff_t)RUN_UNITS * panel, .depth = depth,
                       .ahead = 2 * RUN_UNITS * ldk};
    for (int row = 0; row < keys; row += 2 * RUN_UNITS) {
        x.c = s + (ptrdiff_t)row * panel;
        x.a = k + row * ldk;
        x.rows = keys - row;
        int tall = x.rows > RUN_UNITS;
        tiles_of[tall][wide](&x);
        // One block behind: the last one's tiles are still on their way.
        if (row > 0 && !later)
            for (int j = 0; j <= wide; j++)
                top[j] = highest(top[j], x.c - 2 * RUN_UNITS * panel + j * V_LANES, panel, 2 * RUN_UNITS);
    }
    if (later) {
        finish_scores(s, panel, keys, keep, how, tile_max);
        return;
    }
    const int last = (keys - 1) / (2 * RUN_UNITS) * (2 * RUN_UNITS);
    for (int j = 0; j <= wide; j++)
        v_store((real *)tile_max + j * V_LANES,
                highest(top[j], s + (ptrdiff_t)last * panel + j * V_LANES, panel, keys - last));
}

// ---- turned products -------------------------------------------------------------------------

// Eight columns of 32 rows of halves, as rows of a tile.
INLINE void turn_halves(__m512i *dst, const char *const *row) {
    __m512i x[8], y[8];
    UNROLL for (int j = 0; j < 8; j++) {
        x[j] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)row[j]));
        x[j] = _mm512_inserti32x4(x[j], _mm_loadu_si128((const void *)row[j + 8]), 1);
        x[j] = _mm512_inserti32x4(x[j], _mm_loadu_si128((const void *)row[j + 16]), 2);
        x[j] = _mm512_inserti32x4(x[j], _mm_loadu_si128((const void *)row[j + 24]), 3);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        y[j] = _mm512_unpacklo_epi16(x[2 * j], x[2 * j + 1]);      // columns 0 to 3
        y[4 + j] = _mm512_unpackhi_epi16(x[2 * j], x[2 * j + 1]);  // columns 4 to 7
    }
    UNROLL for (int j = 0; j < 4; j++) {  // of two columns each: four rows, then the four after them
        x[2 * j] = j % 2 ? _mm512_unpackhi_epi32(y[j / 2 * 4], y[j / 2 * 4 + 1])
                         : _mm512_unpacklo_epi32(y[j / 2 * 4], y[j / 2 * 4 + 1]);
        x[2 * j + 1] = j % 2 ? _mm512_unpackhi_epi32(y[j / 2 * 4 + 2], y[j / 2 * 4 + 3])
                             : _mm512_unpacklo_epi32(y[j / 2 * 4 + 2], y[j / 2 * 4 + 3]);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        dst[2 * j] = _mm512_unpacklo_epi64(x[2 * j], x[2 * j + 1]);
        dst[2 * j + 1] = _mm512_unpackhi_epi64(x[2 * j], x[2 * j + 1]);
    }
}

// [run of 32 rows][cols / 16] tiles of the transposed rows; zeros past the last row and column.
static void pack_turned(void *dst_, int cols, const fa_rows *src) {
    static const uint16_t zeros[8];
    __m512i *dst = dst_;
    for (int r = 0; r < src->rows; r += FA_RUN) {
        for (int i = r; i < r + FA_RUN && i < src->rows; i++) fetch_ahead(src, i);
        for (int col = 0; col < cols; col += 8, dst += 8) {
            const int in_place = src->stride == 2 && col + 8 <= src->cols;
            uint16_t part[FA_RUN][8];
            const char *at[FA_RUN];
            for (int i = 0; i < FA_RUN; i++) {
                at[i] = (const char *)(in_place ? zeros : part[i]);
                if (in_place && r + i < src->rows)
                    at[i] = src->row[r + i] + 2 * col;
                else if (!in_place)
                    for (int c = 0; c < 8; c++) part[i][c] = half_at(src, r + i, col + c);
            }
            turn_halves(dst, at);
        }
    }
}

// b is what pack_turned left of the right operand, from a multiple of FA_RUN keys on; c is
// [cols][panel = a_depth].
static void accumulate_turned(const fa_product *x) {
    const int panel = (int)x->a_depth, wide = panel > V_LANES;
    int start = 0, end = x->depth;
    fetch_some(x->fetch, x->fetches, (x->rows + ACCUMULATE_MR - 1) / ACCUMULATE_MR * x->fetch_rows);
    if (x->row_end) {
        start = end;
        end = 0;
        for (int i = 0; i < x->rows; i++) {
            end = x->row_end[i] > end ? x->row_end[i] : end;
            start = x->row_start[i] < start ? x->row_start[i] : start;
        }
    }
    start /= RUN_UNITS;
    end = (end + RUN_UNITS - 1) / RUN_UNITS;
    const ptrdiff_t run = (ptrdiff_t)x->cols * RUN_UNITS;
    tiles_product y = {.ldc = panel, .a_row = RUN_UNITS, .a_next = TILE_UNITS, .a_run = run,
                       .b = (const unit *)x->a + (ptrdiff_t)start * RUN_UNITS * panel, .b_row = panel,
                       .b_run = (ptrdiff_t)RUN_UNITS * panel, .add = !x->fresh, .rows = 2 * RUN_UNITS,
                       .ahead = run, .depth = (end - start) * RUN_UNITS};
    for (int col = 0; col < x->cols; col += 2 * RUN_UNITS) {
        int tall = x->cols - col > RUN_UNITS;
        y.c = (real *)x->c + (ptrdiff_t)col * panel;
        y.a = (const unit *)x->b + start * run + col * RUN_UNITS;
        if (x->alpha && !x->fresh)
            for (int lane = 0; lane < panel; lane += V_LANES) {
                vr alpha = v_load((const real *)x->alpha + lane);
                for (int i = 0; i < (tall ? 2 : 1) * RUN_UNITS; i++) {
                    real *at = y.c + i * panel + lane;
                    v_store(at, v_load(at) * alpha);
                }
            }
        if (x->fresh || y.depth > 0) tiles_of[tall][wide](&y);
    }
}

// The rows of a panel of turned sums.
static void turn_back(void *dst_, const void *src_, int panel, int rows, int cols) {
    real *dst = dst_;
    const real *src = src_;
    for (int col = 0; col < cols; col += V_LANES)
        for (int lane = 0; lane < rows; lane += V_LANES) {
            vr block[V_LANES];
            UNROLL for (int i = 0; i < V_LANES; i++)
                block[i] = v_load(src + (ptrdiff_t)(col + i) * panel + lane);
            v_transpose(block);
            UNROLL for (int i = 0; i < V_LANES; i++)
                if (lane + i < rows) v_store(dst + (ptrdiff_t)(lane + i) * cols + col, block[i]);
        }
}

// ---- products as they lie ----------------------------------------------------------------------

// dst[row][unit], RUN_UNITS of both, from units that lie `ld` apart; zeros past `rows` and `n`.
static void transpose_units(unit *dst, const unit *a, ptrdiff_t ld, int rows, int n) {
    vr block[V_LANES];
    const __mmask16 in_rows = rows < RUN_UNITS ? (__mmask16)((1u << rows) - 1) : 0xffff;
    for (int d = 0; d < RUN_UNITS; d++)
        block[d] = d < n ? (vr)_mm512_maskz_loadu_epi32(in_rows, a + d * ld) : (vr){};
    v_transpose(block);
    for (int row = 0; row < RUN_UNITS; row++) v_store((real *)(dst + row * RUN_UNITS), block[row]);
}

#define LEFT_RUNS 8  // of a transposed left operand at a time

static void accumulate_by_tiles(const fa_product *x) {
    unit left[2][LEFT_RUNS * TILE_UNITS] __attribute__((aligned(64)));
    const real *alpha = x->alpha;
    for (int row = 0; row < x->rows; row += 2 * RUN_UNITS) {
        const int rows = x->rows - row < 2 * RUN_UNITS ? x->rows - row : 2 * RUN_UNITS;
        const int tall = rows > RUN_UNITS;
        int start = 0, end = x->depth;
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
            tiles_product y = {.ldc = x->ldc, .a_row = x->a_row, .a_next = RUN_UNITS * x->a_row,
                               .a_run = RUN_UNITS, .b_row = x->ldb, .b_run = RUN_UNITS * x->ldb,
                               .rows = rows, .depth = n, .add = 1, .ahead = RUN_UNITS};
            y.a = (const unit *)x->a + row * x->a_row + start * x->a_depth;
            if (x->a_depth != 1) {
                for (int i = 0; i <= tall; i++)
                    for (int d = 0; d < n; d += RUN_UNITS)
                        transpose_units(left[i] + d * RUN_UNITS, y.a + i * y.a_next + d * x->a_depth,
                                        x->a_depth, rows - i * RUN_UNITS, n - d);
                y.a = left[0];
                y.a_row = RUN_UNITS;
                y.a_run = TILE_UNITS;
                y.a_next = LEFT_RUNS * TILE_UNITS;
            }
            const int whole = rows % RUN_UNITS == 0 && n % RUN_UNITS == 0;
            for (int col = 0; col < x->cols; col += 2 * V_LANES) {
                int wide = x->cols - col > V_LANES;
                y.c = c + col;
                y.b = (const unit *)x->b + start * x->ldb + col;
                (whole ? tiles_of : edge_tiles_of)[tall][wide](&y);
            }
            start += n;
        }
    }
}

// Four products at a time, each of which waits for its own last one only.
static double peak(int64_t iterations, double *sink) {
    unit zeros[TILE_UNITS] __attribute__((aligned(64))) = {0};
    real c[TILE_UNITS] __attribute__((aligned(64)));
    enter();
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
    leave();
    *sink += (double)c[0];
    return (double)iterations * 4 * RUN_UNITS * RUN_UNITS * RUN_UNITS * PAIR * 2;
}
