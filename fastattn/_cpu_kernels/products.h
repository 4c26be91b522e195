// Products: scores of many rows and of few, and sums of rows with weights, such as P V. A part of
// tile.h.
#pragma once

// Each vector of a register tile. Two loops: GCC unrolls none of more turns than UNROLL says.
#define EACH UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NR; j++)

// c[MR][NR] = A[MR][depth] B[depth][NR vectors]; MR, NR are constants where this is inlined,
// so that c lives in registers. Rows of B, which may be `raw`, that many `ahead` are fetched meanwhile.
INLINE void product(const int MR, const int NR, const int ahead, const int raw, vr *c, const unit *a,
                    ptrdiff_t a_row, ptrdiff_t a_depth, const unit *b, ptrdiff_t ldb, int depth) {
    EACH c[i * NR + j] = (vr){};
    UNROLL4 for (int k = 0; k < depth; k++) {
        uv right[8];
        if (raw)
            u_load_raw(NR, right, b, ldb);
        else
            UNROLL for (int j = 0; j < NR; j++) right[j] = u_load(b + j * V_LANES);
        if (ahead && raw)
            UNROLL for (int j = 0; j < PAIR * NR; j += 2)
                fetch_line(b + (ahead + j % PAIR) * ldb + j * V_LANES / 2);
        else if (ahead)
            UNROLL for (int j = 0; j < NR; j++)
                fetch_line(b + ahead * ldb + j * V_LANES);
        UNROLL for (int i = 0; i < MR; i++) {
            uv left = u_set1(a + i * a_row);
            UNROLL for (int j = 0; j < NR; j++) c[i * NR + j] = u_madd(c[i * NR + j], left, right[j]);
        }
        a += a_depth;
        b += raw ? PAIR * ldb : ldb;
    }
}

// The next rows of each of several arrays, into the second level of the cache.
INLINE void fetch_some(fa_fetch *of, int count, int rows) {
    for (int i = 0; i < count; i++)
        for (int r = 0; r < rows && of[i].rows > 0; r++, of[i].rows--, of[i].row += of[i].step)
            for (int n = 0; n < of[i].bytes; n += 64) fetch_line(of[i].row + n);
}

// A chain of more than this many multiply-adds is cut, and its parts added: rounding errors
// grow with the length of a chain. (Depths of accumulate are cut by the tile.)
#define CHAIN 64

// Fetches what will be added to the scores: as much of it as the keys [key, end) are of all keys.
// All at once would wait for memory.
INLINE void fetch_terms(const fa_adjust *how, int key, int end, int keys) {
    for (int t = 0; t < how->terms; t++) {
        const fa_rows *x = &how->add[t];
        int bytes = x->stride == dtype_bytes(x->dtype) ? x->cols * (int)x->stride : 0;
        for (int r = x->rows * key / keys; r < x->rows * end / keys; r++)
            for (int c = 0; c < bytes; c += 64) __builtin_prefetch(x->row[r] + c);
    }
}

#ifdef FA_AMX
#include "amx.h"
#else
// Whether all there is to do is to scale the scores and to add one term.
INLINE int is_plain_sum(const fa_adjust *how) {
    return how->terms == 1 && how->softcap == 0 && !how->slope;
}

// Puts the term of V_LANES keys at most, from `key` on, where their scores will be; returns of how many.
// What is fetched further ahead than that many bytes is pushed out again: rows lie a power of two apart.
#define TERMS_AHEAD 128
static int put_terms(real *s, int panel, int key, int keys, const fa_rows *src, int one_row) {
    int first = one_row ? 0 : terms_before_line(src, 0);
    int n = key == 0 && first > 0 ? first : V_LANES;
    n = keys - key < n ? keys - key : n;
    for (int r = 0; r < src->rows && !one_row; r++)
        __builtin_prefetch(src->row[r] + key * src->stride + TERMS_AHEAD, 0, 2);
    for (int lane = 0; lane < panel; lane += V_LANES)
        load_terms(s + (ptrdiff_t)key * panel + lane, panel, src, one_row, lane, key, n);
    return n;
}

// A chain of the scores of one panel.
typedef struct {
    real *s;
    const unit *k, *q;
    ptrdiff_t ldk;
    int panel, depth;
    int add;               // s holds what the chain is added to
    const fa_adjust *how;  // s holds the one term of it, or NULL
    const uint32_t *keep;  // of the last chain, or NULL
    vr *top;
} scores_chain;

// MR keys from `row` on with NR vectors of queries from `lane` on.
INLINE void scores_tile(const int MR, const int NR, const scores_chain *x, int row, int lane) {
    const int panel = NR == 2 ? 2 * V_LANES : x->panel;
    real *s = x->s + (ptrdiff_t)row * panel + lane;
    vr c[MR * NR], *top = x->top + lane / V_LANES;
    product(MR, NR, 0, 0, c, x->k + row * x->ldk, x->ldk, 1, x->q + lane, panel, x->depth);
    if (x->add) EACH c[i * NR + j] += v_load(s + i * panel + j * V_LANES);
    if (x->how) {
        const vr scale = v_set1((real)x->how->scale);
        EACH {
            vr term = v_load(s + i * panel + j * V_LANES);
            c[i * NR + j] = v_below(v_fma(c[i * NR + j], scale, term), term);
        }
    }
    if (x->keep)
        EACH c[i * NR + j] = v_choose(x->keep[row + i] >> (lane + j * V_LANES), c[i * NR + j],
                                      v_set1(-INFINITY));
    EACH v_store(s + i * panel + j * V_LANES, c[i * NR + j]);
    UNROLL for (int j = 0; j < NR; j++) {
        vr most = c[j];  // not top[j] each time, which the stores might have changed
        UNROLL for (int i = 1; i < MR; i++) most = v_max(most, c[i * NR + j]);
        top[j] = v_max(top[j], most);
    }
}
typedef void scores_fn(const scores_chain *x, int row, int lane);
#define DEFINE_SCORES(MR, NR)                                                                    \
    NOINLINE void scores_##MR##x##NR(const scores_chain *x, int row, int lane) {                 \
        scores_tile(MR, NR, x, row, lane);                                                       \
    }
#if FA_SCORES_MR == 8
DEFINE_SCORES(8, 1)
DEFINE_SCORES(8, 2)
#else
DEFINE_SCORES(6, 1)
DEFINE_SCORES(6, 2)
#endif
DEFINE_SCORES(4, 1)
DEFINE_SCORES(4, 2)
DEFINE_SCORES(2, 1)
DEFINE_SCORES(2, 2)
DEFINE_SCORES(1, 1)
DEFINE_SCORES(1, 2)

static void scores(void *s, int panel, const void *k, ptrdiff_t ldk, int in_place, const void *q, int keys,
                   int depth, const uint32_t *keep, const fa_adjust *how, void *tile_max) {
    static const struct {
        int rows;
        scores_fn *run[2];
    } table[] = {
#if FA_SCORES_MR == 8
        {8, {scores_8x1, scores_8x2}},
#else
        {6, {scores_6x1, scores_6x2}},
#endif
        {4, {scores_4x1, scores_4x2}},
        {2, {scores_2x1, scores_2x2}},
        {1, {scores_1x1, scores_1x2}},
    };
    const int wide = panel / V_LANES - 1;
    const uint32_t one = (uint32_t)((1ull << V_LANES) - 1), whole = wide ? one << V_LANES | one : one;
    vr top[2];
    scores_chain x = {.s = s, .k = k, .q = q, .ldk = ldk, .panel = panel, .top = top};
    int d = 0, terms = 0, one_row = 0;
    if (how && depth <= CHAIN && is_plain_sum(how)) {
        x.how = how;
        one_row = is_one_row(&how->add[0]);
    }
    do {
        x.depth = depth - d < CHAIN ? depth - d : CHAIN;
        x.add = d > 0;
        top[0] = top[1] = v_set1(-INFINITY);
        for (int row = 0, t = 0; row < keys; row += table[t].rows) {
            while (row + table[t].rows > keys) t++;
            const int rows = table[t].rows;
            uint32_t some = keep ? 0 : whole, all = whole;
            for (int i = row; keep && i < row + rows; i++) {
                some |= keep[i];
                all &= keep[i];
            }
            const int seen[2] = {(some & one) != 0, some > one};
            if (in_place && panel == V_LANES)  // so few rows of q take keys as fast as memory gives them
                for (int i = row + FA_AHEAD; i < row + FA_AHEAD + rows; i++)
                    for (int c = 0; c < x.depth; c += 64 / (int)sizeof(unit)) fetch_line(x.k + i * ldk + c);
            if (how && !x.how && d == 0) fetch_terms(how, row, row + rows, keys);
            while (x.how && terms < row + rows)
                terms += put_terms(s, panel, terms, keys, &x.how->add[0], one_row);
            x.keep = all == whole || d + x.depth < depth ? NULL : keep;
            if (seen[0] && seen[wide]) {
                table[t].run[wide](&x, row, 0);
                continue;
            }
            for (int j = 0; j <= wide; j++)
                if (seen[j])
                    table[t].run[0](&x, row, j * V_LANES);
                else
                    for (int i = row; i < row + rows; i++)
                        v_store(x.s + (ptrdiff_t)i * panel + j * V_LANES, v_set1(-INFINITY));
        }
        x.k += x.depth;
        x.q += (ptrdiff_t)x.depth * panel;
        d += x.depth;
    } while (d < depth);
    for (int j = 0; j <= wide; j++) v_store((real *)tile_max + j * V_LANES, top[j]);
    if (how && !x.how) finish_scores(s, panel, keys, keep, how, tile_max);
}
#endif

// Scores of a few rows: the lanes are the summed axis. MR rows x V_LANES / MR keys at a time, so
// that their sums over the lanes make up one vector. Keys past the last one are the last again.
INLINE void dots(const int MR, const int whole, const int raw, real *s, int panel, const unit *k,
                 ptrdiff_t ldk, const unit *q, ptrdiff_t ldq, int keys, int depth, int add, ureal flip) {
    const int NR = V_LANES / MR;
    const unit *ahead = k + FA_AHEAD * ldk;
    vr c[V_LANES];
    UNROLL for (int i = 0; i < V_LANES; i++) c[i] = (vr){};
    int col = 0, d = 0;
    do {  // depth > 0, and the sums stay in registers
        UNROLL for (int j = 0; j < NR; j++) {
            if (whole) {  // as many vectors as are used, row by row: that is how they lie
                fetch_line(ahead + (raw ? col / 2 : col));
                col += V_LANES;
                int next_row = col >= depth;
                ahead += next_row ? ldk : 0;
                col = next_row ? 0 : col;
            }
            const unit *row = k + (whole || j < keys ? j : keys - 1) * ldk;
            uv right;
            if (raw)
                u_load_raw(1, &right, row + d / 2, ldk);
            else
                right = u_load(row + d);
            UNROLL for (int i = 0; i < MR; i++)
                c[j * MR + i] = u_madd(c[j * MR + i], u_load(q + i * ldq + d), right);
        }
        d += V_LANES;
    } while (d < depth);
    real part[V_LANES] __attribute__((aligned(V_BYTES)));
    vr sums = (vr)((vu)v_sums(c) ^ flip);
    if (add) {
        UNROLL for (int j = 0; j < NR; j++)
            if (whole || j < keys) memcpy(part + j * MR, s + j * panel, MR * sizeof(real));
        sums += v_load(part);
    }
    v_store(part, sums);
    UNROLL for (int j = 0; j < NR; j++)
        if (whole || j < keys) memcpy(s + j * panel, part + j * MR, MR * sizeof(real));
}
#define DEFINE_DOTS(name, MR, raw)                                                               \
    NOINLINE void name(real *s, int panel, const unit *k, ptrdiff_t ldk, const unit *q,          \
                       ptrdiff_t ldq, int keys, int depth, int add, ureal flip) {                \
        int key = 0;                                                                             \
        for (; key + V_LANES / MR <= keys; key += V_LANES / MR)                                  \
            dots(MR, 1, raw, s + key * panel, panel, k + key * ldk, ldk, q, ldq, 0, depth, add,  \
                 flip);                                                                          \
        if (key < keys)                                                                          \
            dots(MR, 0, raw, s + key * panel, panel, k + key * ldk, ldk, q, ldq, keys - key,     \
                 depth, add, flip);                                                              \
    }
DEFINE_DOTS(dots_1, 1, 0)
DEFINE_DOTS(dots_2, 2, 0)
DEFINE_DOTS(dots_raw_1, 1, 1)
DEFINE_DOTS(dots_raw_2, 2, 1)
#if V_BYTES > 16
DEFINE_DOTS(dots_4, 4, 0)
DEFINE_DOTS(dots_raw_4, 4, 1)
#endif
#define DOTS(MR)                                                                                 \
    for (; row + MR <= rows; row += MR)                                                          \
        (raw ? dots_raw_##MR : dots_##MR)(to + row, panel, k, ldk, q + row * ldq, ldq, n, part,  \
                                          d > 0, flip);

static void few_scores(void *s_, int panel, const void *k_, ptrdiff_t ldk, const void *q_,
                       ptrdiff_t ldq, int rows, int keys, int depth, int negate, int raw,
                       const uint32_t *keep, const fa_adjust *how, void *tile_max) {
    ureal flip = negate ? (ureal)1 << (8 * sizeof(real) - 1) : 0;
    real *s = s_;
    memset(s, 0, (size_t)keys * panel * sizeof(real));
    for (int d = 0; d < depth; d += CHAIN * V_LANES)
        for (int key = 0; key < keys; key += V_LANES) {
            int n = keys - key < V_LANES ? keys - key : V_LANES;
            int part = depth - d < CHAIN * V_LANES ? depth - d : CHAIN * V_LANES;
            const unit *k = (const unit *)k_ + key * ldk + (raw ? d / 2 : d), *q = (const unit *)q_ + d;
            real *to = s + (ptrdiff_t)key * panel;
            int row = 0;
#if V_BYTES > 16
            DOTS(4)
#endif
            DOTS(2)
            DOTS(1)
        }
    finish_scores(s, panel, keys, keep, how, tile_max);
}

// Few rows read the right operand from memory, unless it was packed.
#define ACCUMULATE_AHEAD(MR) (PAIR == 1 && MR <= FA_FEW_ROWS ? FA_AHEAD / 2 : 0)

INLINE void accumulate_tile(const int MR, const int NR, const int raw, const fa_product *x, int row,
                            int col, int start, int end) {
    const unit *b = raw ? (const unit *)x->b + start * PAIR * x->ldb + col / 2
                        : (const unit *)x->b + start * x->ldb + col;
    vr c[MR * NR];
    const real *alpha = x->alpha;
    real *out = (real *)x->c + row * x->ldc + col;
    if (x->cold) EACH __builtin_prefetch(out + i * x->ldc + j * V_LANES);
    product(MR, NR, raw ? FA_AHEAD : ACCUMULATE_AHEAD(MR), raw, c,
            (const unit *)x->a + row * x->a_row + start * x->a_depth, x->a_row, x->a_depth, b, x->ldb,
            end - start);
    if (alpha)
        EACH c[i * NR + j] = v_fma(v_set1(alpha[row + i]), v_loadu(out + i * x->ldc + j * V_LANES),
                                   c[i * NR + j]);
    else
        EACH c[i * NR + j] += v_loadu(out + i * x->ldc + j * V_LANES);
    EACH v_storeu(out + i * x->ldc + j * V_LANES, c[i * NR + j]);
}
typedef void accumulate_fn(const fa_product *x, int row, int col, int start, int end);
#define DEFINE_ACCUMULATE(MR, NR)                                                                \
    NOINLINE void accumulate_##MR##x##NR(const fa_product *x, int row, int col, int start,       \
                                         int end) {                                              \
        accumulate_tile(MR, NR, 0, x, row, col, start, end);                                     \
    }
#define DEFINE_ACCUMULATE_RAW(MR, NR)                                                            \
    NOINLINE void accumulate_raw_##MR##x##NR(const fa_product *x, int row, int col, int start,   \
                                             int end) {                                          \
        accumulate_tile(MR, NR, 1, x, row, col, start, end);                                     \
    }
#define DEFINE_ACCUMULATE_ROWS(NR) \
    DEFINE_ACCUMULATE(1, NR)       \
    DEFINE_ACCUMULATE(2, NR)       \
    DEFINE_ACCUMULATE(3, NR)       \
    DEFINE_ACCUMULATE(4, NR)       \
    DEFINE_ACCUMULATE(5, NR)       \
    DEFINE_ACCUMULATE(6, NR)       \
    DEFINE_ACCUMULATE_RAW(1, NR)   \
    DEFINE_ACCUMULATE_RAW(2, NR)   \
    DEFINE_ACCUMULATE_RAW(3, NR)   \
    DEFINE_ACCUMULATE_RAW(4, NR)
#define ACCUMULATE_ROWS(NR)                                                                      \
    {accumulate_1x##NR, accumulate_2x##NR, accumulate_3x##NR,                                    \
     accumulate_4x##NR, accumulate_5x##NR, accumulate_6x##NR},                                   \
    {accumulate_raw_1x##NR, accumulate_raw_2x##NR, accumulate_raw_3x##NR, accumulate_raw_4x##NR}
DEFINE_ACCUMULATE_ROWS(1)
DEFINE_ACCUMULATE_ROWS(2)
#if FA_ACCUMULATE_NR == 4
DEFINE_ACCUMULATE_ROWS(4)
DEFINE_ACCUMULATE_RAW(1, 8)
DEFINE_ACCUMULATE_RAW(2, 8)
#endif

// The part of all depths that is [first, last).
INLINE void accumulate_strip(const fa_product *x, int first, int last, int most_rows) {
    static const struct {
        int vectors;
        accumulate_fn *run[ACCUMULATE_MR], *raw[FA_FEW_ROWS];
    } table[] = {
#if FA_ACCUMULATE_NR == 4
        {8, {0}, {accumulate_raw_1x8, accumulate_raw_2x8}},
        {4, ACCUMULATE_ROWS(4)},
#endif
        {2, ACCUMULATE_ROWS(2)},
        {1, ACCUMULATE_ROWS(1)},
    };
    // One or two rows wait for memory, which is fastest along whole rows.
    int col = 0;
    for (int t = FA_ACCUMULATE_NR == 4 && !(x->raw && x->rows <= 2); col < x->cols; t++) {
        int width = table[t].vectors * V_LANES;
        for (; col + width <= x->cols; col += width)
            for (int row = 0; row < x->rows;) {
                int left = x->rows - row, groups = (left + most_rows - 1) / most_rows;
                int n = (left + groups - 1) / groups;  // about equal: few rows are slow
                int start = first, end = last;
                if (x->row_end) {
                    end = first;
                    for (int i = row; i < row + n; i++)
                        if (x->row_end[i] > end) end = x->row_end[i];
                    if (end > last) end = last;
                }
                if (x->row_start) {
                    start = end;
                    for (int i = row; i < row + n; i++)
                        if (x->row_start[i] < start) start = x->row_start[i];
                    if (start < first) start = first;
                }
                if (col == 0) fetch_some(x->fetch, x->fetches, x->fetch_rows);
                (x->raw ? table[t].raw : table[t].run)[n - 1](x, row, col, start, end);
                row += n;
            }
    }
}

static void accumulate_by_vectors(const fa_product *x) {
    if (!x->strip) {
        accumulate_strip(x, 0, x->depth, ACCUMULATE_MR);
        return;
    }
    fa_product strip = *x;
    for (int first = 0; first < x->depth; first += x->strip, strip.alpha = 0) {
        int last = first + x->strip;
        accumulate_strip(&strip, first, last < x->depth ? last : x->depth, FA_FEW_ROWS);
    }
}

static void accumulate(const fa_product *x) {
#ifdef FA_AMX
    if (!x->few) {
        accumulate_by_tiles(x);
        return;
    }
#endif
    accumulate_by_vectors(x);
}

// Row by row, with the right operand's excluded parts replaced by zeros.
static void accumulate_selected(const fa_product *x, const fa_selection *which) {
    unit *clean = which->scratch;
    for (int row = 0; row < x->rows; row++) {
        for (int d = 0; d < x->depth; d++) {
            const unit *b = (const unit *)x->b + d * x->ldb;
            unit *to = clean + (ptrdiff_t)d * x->cols;
            int kept = 0;
            for (int half = 0; half < PAIR; half++) {
                int at = d * PAIR + half, key = which->rows_are_keys ? row : at;
                int lane = which->rows_are_keys ? at : row;
                if (key < which->keys)
                    kept |= (which->keep[(ptrdiff_t)(lane / which->panel) * which->ld + key] >>
                             (lane % which->panel) & 1) << half;
            }
#ifdef FA_BF16_PAIRS
            uint32_t bits = (kept & 1 ? 0xffffu : 0) | (kept & 2 ? 0xffff0000u : 0);
            for (int c = 0; c < x->cols; c++) to[c] = b[c] & bits;
#else
            if (kept)
                memcpy(to, b, (size_t)x->cols * sizeof(unit));
            else
                memset(to, 0, (size_t)x->cols * sizeof(unit));
#endif
        }
        fa_product one = *x;
        one.c = (real *)x->c + row * x->ldc;
        one.a = (const unit *)x->a + row * x->a_row;
        one.b = clean;
        one.ldb = x->cols;
        one.rows = 1;
        one.alpha = x->alpha ? (const real *)x->alpha + row : 0;
        one.row_start = one.row_end = 0;
        one.fetches = 0;
        accumulate(&one);
    }
}
