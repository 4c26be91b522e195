// Scores to probabilities in the forward, by the online softmax, and results of chunks of keys
// merged. A part of tile.h.
#pragma once

INLINE vr dropped(vr p, const uint32_t *drop, int key, int lane, vr drop_scale) {
    return drop ? p * v_select(v_mask(drop[key] >> lane), drop_scale, (vr){}) : p;
}

static int softmax(void *p_, void *s_, int panel, int keys, double scale, const fa_softmax_state *st,
                   const uint32_t *drop, double drop_scale_) {
    const real *s = s_;
    real *row_max = st->row_max, *row_sum = st->row_sum, *row_lost = st->row_lost;
    vr c = v_set1((real)(scale * LOG2E)), drop_scale = v_set1((real)drop_scale_);
    uint32_t moved = 0;
    for (int lane = 0; lane < panel; lane += V_LANES) {
        vr old = v_load(row_max + lane);
        vr top = v_max(old, v_load((const real *)st->tile_max + lane));
        // Nothing but -inf yet: any finite reference gives exp(-inf) = 0, not exp(-inf + inf).
        vr ref = v_select(top == v_set1(-INFINITY), (vr){}, top);
        vr alpha = v_exp2(old - ref, c), sum = {};
        moved |= v_bits(top > old);
        v_store((real *)st->alpha + lane, alpha);
        v_store(row_max + lane, top);
        for (int run = 0; run < keys; run += FA_RUN) {
            int end = run + FA_RUN < keys ? run + FA_RUN : keys;
            vr part = {};
            for (int key = run; key < end; key += PAIR) {
                vr p[PAIR];
                for (int half = 0; half < PAIR; half++) {
                    int j = key + half;
                    p[half] = (vr){};
                    if (j >= keys) continue;
                    p[half] = v_exp2(v_load(s + (ptrdiff_t)j * panel + lane) - ref, c);
                    part += p[half];
                    p[half] = dropped(p[half], drop, j, lane, drop_scale);
                }
#ifdef FA_BF16_PAIRS
                _mm512_store_si512((unit *)p_ + (ptrdiff_t)(key / 2) * panel + lane, u_pairs(p[0], p[1]));
#else
                v_store((real *)p_ + (ptrdiff_t)key * panel + lane, p[0]);
#endif
            }
            sum += part;
        }
#ifdef FA_AMX  // whole runs are multiplied
        for (int key = (keys + 1) / 2; key < (keys + FA_RUN - 1) / FA_RUN * FA_RUN / 2; key++)
            _mm512_store_si512((unit *)p_ + (ptrdiff_t)key * panel + lane, _mm512_setzero_si512());
#endif
        vr before = v_load(row_sum + lane), total = v_fma(before, alpha, sum);
        v_store(row_sum + lane, total);
        v_store(row_lost + lane, v_fma(v_load(row_lost + lane), alpha, sum + v_fma(before, alpha, -total)));
    }
    return moved != 0;
}

static void merge(const fa_partial *x, const fa_partial *y, int rows, int cols, double scale) {
    vr c = v_set1((real)(scale * LOG2E));
    for (int lane = 0; lane < rows; lane += V_LANES) {
        real *x_max = (real *)x->row_max + lane, *x_sum = (real *)x->row_sum + lane;
        real *x_lost = (real *)x->row_lost + lane;
        vr a = v_load(x_max), b = v_load((const real *)y->row_max + lane);
        vr a_sum = v_load(x_sum), b_sum = v_load((const real *)y->row_sum + lane);
        vr a_lost = v_load(x_lost), b_lost = v_load((const real *)y->row_lost + lane);
        vi first = a >= b;
        vr top = v_select(first, a, b), ref = v_select(top == v_set1(-INFINITY), (vr){}, top);
        vr low = v_exp2(v_select(first, b, a) - ref, c);  // the weight of the lower one
        vr high_sum = v_select(first, a_sum, b_sum), low_sum = v_select(first, b_sum, a_sum);
        vr total = v_fma(low_sum, low, high_sum);
        v_store(x_max, top);
        v_store(x_sum, total);
        v_store(x_lost, v_fma(v_select(first, b_lost, a_lost), low, v_select(first, a_lost, b_lost)) +
                            v_fma(low_sum, low, high_sum - total));
        for (int i = 0; i < V_LANES && lane + i < rows; i++) {
            vr weight = v_set1(low[i]);
            for (int col = 0; col < cols; col += V_LANES) {
                real *xo = (real *)x->o + (ptrdiff_t)(lane + i) * cols + col;
                const real *yo = (const real *)y->o + (ptrdiff_t)(lane + i) * cols + col;
                v_store(xo, first[i] ? v_fma(v_load(yo), weight, v_load(xo))
                                     : v_fma(v_load(xo), weight, v_load(yo)));
            }
        }
    }
}
