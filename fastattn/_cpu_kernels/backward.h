// Scores to probabilities and gradients in the backward, and sums over tiles. A part of tile.h.
#pragma once

// p = exp(scale s - lse). lse may be rounded so coarsely that s exceeds it; p is a probability still.
INLINE vr probability(vr score, vr scale, vr lse) {
    return v_exp2(v_min((vr){}, v_fma(score, scale, -lse)), v_set1((real)LOG2E));
}
#ifdef FA_BF16_PAIRS
// The same to within 1.02e-4 of p, a 19th of what rounding to bfloat16 may change it by.
// 2^f = 1 + f q(f) with the quadratic q that minimises the largest relative error.
INLINE vr rough_probability(vr score, vr scale, vr lse) {
    vr x = v_fma(score, scale * v_set1((real)LOG2E), lse * v_set1((real)-LOG2E));
    x = v_max(v_set1(-2 * V_BIAS), v_min((vr){}, x));
    vr n = (vr)V_X86(roundscale)((v_x86)x, 0x08), f = x - n;
    HORNER_BEGIN(0x1.c2a218p-5);
    HORNER(0x1.f00c52p-3);
    HORNER(0x1.62f5fap-1);
    return (vr)V_X86(scalef)((v_x86)v_fma(f, q, v_set1(1)), (v_x86)n);
}
#else
#define rough_probability probability
#endif

// One vector of queries and PAIR keys of P and dS; with `rows` 1 the second key's row does not exist,
// its values are zeros.
typedef struct {
    unit *p, *ds, *ds_keys;
    ptrdiff_t ld;
} gradient_rows;
INLINE gradient_rows gradients_at(const fa_backward_tile *x, int key) {
    return (gradient_rows){(unit *)x->p + key * x->ld, (unit *)x->ds + key * x->ld,
                           (unit *)x->ds_keys + key * x->ld, x->ld};
}
INLINE void store_gradients(gradient_rows to, int lane, int rows, const vr *p, const vr *ds) {
#ifdef FA_BF16_PAIRS
    __m512i halves[2] = {(__m512i)_mm512_cvtne2ps_pbh((__m512)p[1], (__m512)p[0]),
                         (__m512i)_mm512_cvtne2ps_pbh((__m512)ds[1], (__m512)ds[0])};
    unit *rows_of[2] = {to.p + lane / 2, to.ds + lane / 2};
    UNROLL for (int i = 0; i < 2; i++) {
        _mm256_store_si256((void *)rows_of[i], _mm512_castsi512_si256(halves[i]));
        if (rows == 2)
            _mm256_store_si256((void *)(rows_of[i] + to.ld), _mm512_extracti64x4_epi64(halves[i], 1));
    }
    _mm512_store_si512(to.ds_keys + lane, u_interleave(halves[1]));
#else
    (void)rows;
    v_store(to.p + lane, p[0]);
    v_store(to.ds + lane, ds[0]);
#endif
}

INLINE int gradients_tile(const int leave_t, const fa_backward_tile *x, int panel, int keys) {
    const real *s = x->s, *gain = x->gain, *x_lse = x->lse, *x_shift = x->shift;
    const uint32_t *keep = x->keep, *drop = x->drop;
    real *dp = x->dp;
    vr scale = v_set1((real)x->scale), drop_scale = v_set1((real)x->drop_scale), any_lost = {};
    for (int key = 0; key < keys; key += PAIR) {
        gradient_rows to = gradients_at(x, key);
        int rows = keys - key < PAIR ? keys - key : PAIR;
        for (int lane = 0; lane < panel; lane += V_LANES) {
            vr lse = v_load(x_lse + lane), shift = v_load(x_shift + lane);
            vr p[PAIR] = {}, ds[PAIR] = {};
            UNROLL for (int half = 0; half < PAIR; half++) {
                if (half >= rows) break;
                int j = key + half;
                ptrdiff_t at = (ptrdiff_t)j * panel + lane;
                vr score = v_load(s + at);
                vi lost = score == v_set1(-INFINITY);
                any_lost = (vr)((vi)any_lost | lost);
                if (keep) lost |= ~v_mask(keep[j] >> lane);
                vr prob = x->rough ? rough_probability(score, scale, lse) : probability(score, scale, lse);
                prob = v_select(lost, (vr){}, prob);
                vr z_dp = dropped(v_load(dp + at), drop, j, lane, drop_scale);
                vr t = v_select(lost, (vr){}, prob * (z_dp - shift));
                if (leave_t) v_store(dp + at, t);
                ds[half] = gain ? v_select(lost, (vr){}, t * v_load(gain + at)) : t;
                p[half] = dropped(prob, drop, j, lane, drop_scale);
            }
            store_gradients(to, lane, rows, p, ds);
        }
    }
    return v_bits((vi)any_lost) != 0;
}

static int backward_tile(const fa_backward_tile *x, int panel, int keys) {
    return gradients_tile(1, x, panel, keys);
}

#ifdef FA_AMX
// Scores leave the tiles' registers by memory.
static int backward_plain(const fa_backward_tile *x, int panel, int keys) {
    real top[FA_MAX_PANEL] __attribute__((aligned(V_BYTES)));
    scores(x->s, panel, x->k, x->ldk, 0, x->q, keys, x->D, NULL, NULL, top);
    fetch_some(x->fetch, x->fetches, keys * x->fetch_rows);
    return gradients_tile(0, x, panel, keys);  // dp may be wanted again
}
#else
// The last chain of the scores and backward_tile in one, where that is all there is to do: P and dS
// come straight from the registers. The same operations on each element, so the same bits.
// (dP in registers too leaves room for half the keys: 1 to 6 % slower on Zen 4.)
// Returns the lowest of `lowest` and the scores.
INLINE vr plain_tile(const int MR, const int NR, const fa_backward_tile *x, int row, int depth,
                     vr lowest) {
    vr c[MR * NR], scale = v_set1((real)x->scale);
    const int panel = NR * V_LANES, first = x->D - depth;
    const real *s = (const real *)x->s + (ptrdiff_t)row * panel;
    const real *dp = (const real *)x->dp + (ptrdiff_t)row * panel;
    gradient_rows to = gradients_at(x, row);
    fetch_some(x->fetch, x->fetches, x->fetch_rows);
    product(MR, NR, 0, 0, c, (const unit *)x->k + row * x->ldk + first, x->ldk, 1,
            (const unit *)x->q + (ptrdiff_t)first * panel, panel, depth);
    if (first > 0) EACH c[i * NR + j] += v_load(s + i * panel + j * V_LANES);
    vr lse[NR], shift[NR];  // not at each use: the stores might have changed them
    UNROLL for (int j = 0; j < NR; j++) {
        lse[j] = v_load((const real *)x->lse + j * V_LANES);
        shift[j] = v_load((const real *)x->shift + j * V_LANES);
    }
    UNROLL for (int i = 0; i < MR; i += PAIR) {
        UNROLL for (int j = 0; j < NR; j++) {
            vr p[PAIR] = {}, ds[PAIR] = {};
            UNROLL for (int half = 0; half < PAIR; half++) {
                if (i + half == MR) break;
                vr score = c[(i + half) * NR + j];
                vr z_dp = v_load(dp + (i + half) * panel + j * V_LANES);
                lowest = v_min(score, lowest);
                p[half] = rough_probability(score, scale, lse[j]);
                ds[half] = p[half] * (z_dp - shift[j]);
            }
            store_gradients(to, j * V_LANES, MR - i < PAIR ? MR - i : PAIR, p, ds);
        }
        to.p += PAIR * to.ld;
        to.ds += PAIR * to.ld;
        to.ds_keys += PAIR * to.ld;
    }
    return lowest;
}
typedef vr plain_fn(const fa_backward_tile *x, int row, int depth, vr lowest);
#define DEFINE_PLAIN(MR, NR)                                                                     \
    NOINLINE vr plain_##MR##x##NR(const fa_backward_tile *x, int row, int depth, vr lowest) {    \
        return plain_tile(MR, NR, x, row, depth, lowest);                                        \
    }
#if FA_SCORES_MR == 8
DEFINE_PLAIN(8, 1)
DEFINE_PLAIN(8, 2)
#else
DEFINE_PLAIN(6, 1)
DEFINE_PLAIN(6, 2)
#endif
DEFINE_PLAIN(4, 1)
DEFINE_PLAIN(4, 2)
DEFINE_PLAIN(2, 1)
DEFINE_PLAIN(2, 2)
DEFINE_PLAIN(1, 1)
DEFINE_PLAIN(1, 2)

static int backward_plain(const fa_backward_tile *x, int panel, int keys) {
    static const struct {
        int rows;
        plain_fn *run[2];
    } table[] = {
#if FA_SCORES_MR == 8
        {8, {plain_8x1, plain_8x2}},
#else
        {6, {plain_6x1, plain_6x2}},
#endif
        {4, {plain_4x1, plain_4x2}},
        {2, {plain_2x1, plain_2x2}},
        {1, {plain_1x1, plain_1x2}},
    };
    int wide = panel / V_LANES - 1, row = 0, before = x->D > 0 ? (x->D - 1) / CHAIN * CHAIN : 0;
    vr lowest = {}, top[2];
    if (before > 0) scores(x->s, panel, x->k, x->ldk, 0, x->q, keys, before, NULL, NULL, top);
    for (int t = 0; row < keys; t++)
        for (; row + table[t].rows <= keys; row += table[t].rows)
            lowest = table[t].run[wide](x, row, x->D - before, lowest);
    return v_bits(lowest == v_set1(-INFINITY)) != 0;
}
#endif

static void add_tile(double *sum, const void *x_, int64_t n) {
    const real *x = x_;
    for (int64_t i = 0; i < n; i++) sum[i] += x[i];
}

static void add_distances(void *sum_, const void *t_, int panel, int keys, const void *centre) {
    const real *t = t_;
    for (int lane = 0; lane < panel; lane += V_LANES) {
        vr at = v_load((const real *)centre + lane), sum = {};
        for (int run = 0; run < keys; run += FA_RUN) {
            vr part = {};
            for (int key = run; key < keys && key < run + FA_RUN; key++)
                part = v_fma(v_load(t + (ptrdiff_t)key * panel + lane),
                             v_abs(at - v_set1((real)key)), part);
            sum += part;
        }
        real *out = (real *)sum_ + lane;
        v_store(out, v_load(out) + sum);
    }
}
