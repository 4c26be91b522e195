// Scores are finished: softcap, added terms, ALiBi, and what is excluded. A part of tile.h.
#pragma once

// `width` <= V_LANES keys from `key` on of what is added to the scores of V_LANES rows from `lane` on:
// to[key][lane], zeros past the last row.
INLINE void load_whole_terms(const int dtype, real *to, ptrdiff_t ld, const fa_rows *src, int lane,
                             int key, int width) {
    const char *const *row = src->row + lane;
    vr block[V_LANES];
    UNROLL for (int r = 0; r < V_LANES; r++) {
        const char *at = row[r] + key * dtype_bytes(dtype);
        block[r] = width == V_LANES ? load_vector(at, dtype) : v_load_part((const real *)at, width);
    }
    v_transpose(block);
    UNROLL for (int c = 0; c < V_LANES; c++) {
        if (c == width) break;
        v_store(to + c * ld, block[c]);
    }
}
NOINLINE void load_terms(real *to, ptrdiff_t ld, const fa_rows *src, int one_row, int lane, int key,
                         int width) {
    real part[V_LANES] __attribute__((aligned(V_BYTES))) = {0};
    int whole = lane + V_LANES <= src->rows && src->stride == dtype_bytes(src->dtype);
    if (one_row) {
        load_row(part, src->row[0] + key * src->stride, src->stride, width, src->dtype);
        for (int c = 0; c < width; c++) v_store(to + c * ld, v_set1(part[c]));
    } else if (whole && width < V_LANES && src->dtype == NATIVE) {
        load_whole_terms(NATIVE, to, ld, src, lane, key, width);
    } else if (whole && width == V_LANES) {
        switch (src->dtype) {
        case FA_F16: load_whole_terms(FA_F16, to, ld, src, lane, key, V_LANES); break;
        case FA_BF16: load_whole_terms(FA_BF16, to, ld, src, lane, key, V_LANES); break;
        case FA_F32: load_whole_terms(FA_F32, to, ld, src, lane, key, V_LANES); break;
        default: load_whole_terms(FA_F64, to, ld, src, lane, key, V_LANES);
        }
    } else {
        vr block[V_LANES];
        for (int r = 0; r < V_LANES; r++) {
            if (lane + r < src->rows)
                load_row(part, src->row[lane + r] + key * src->stride, src->stride, width, src->dtype);
            else
                memset(part, 0, sizeof part);
            block[r] = v_load(part);
        }
        v_transpose(block);
        for (int c = 0; c < width; c++) v_store(to + c * ld, block[c]);
    }
}

// Keys before the first vector of a row that straddles no two lines of the cache. Rows mostly lie a
// multiple of many lines apart: of a line that is read twice the first half would not stay.
static int terms_before_line(const fa_rows *x, int lane) {
    const int bytes = dtype_bytes(x->dtype);
    if (lane >= x->rows || x->stride != bytes) return 0;
    return (int)(-(uintptr_t)x->row[lane] % (uintptr_t)(V_LANES * bytes)) / bytes;
}

static int is_one_row(const fa_rows *x) {
    for (int r = 1; r < x->rows; r++)
        if (x->row[r] != x->row[0]) return 0;
    return 1;
}

// One vector of rows and V_LANES keys at most.
INLINE vr add_terms(const int terms, vr (*add)[V_LANES], real *s, int panel, int keys, vr scale,
                    int sloped, vr slope, vr distance, vr top) {
    UNROLL for (int c = 0; c < V_LANES; c++) {
        if (c == keys) break;
        vr x = v_load(s + c * panel);
        x = terms > 0 ? v_fma(x, scale, add[0][c]) : x * scale;
        if (terms > 1) x += add[1][c];
        if (sloped) x = v_fma(slope, v_abs(distance - v_set1((real)c)), x);
        UNROLL for (int t = 0; t < terms; t++) x = v_below(x, add[t][c]);
        v_store(s + c * panel, x);
        top = v_max(top, x);
    }
    return top;
}

static void adjust(real *s, int panel, int keys, const fa_adjust *how, real *tile_max) {
    real *gain = how->gain;
    const real *slopes = how->slope;
    int sloped = slopes != 0, one_row[2] = {0};
    vr scale = v_set1((real)how->scale);
    if (how->softcap != 0) {
        vr cap = v_set1((real)how->softcap), per_cap = v_set1((real)(1 / how->softcap));
        for (int lane = 0; lane < panel; lane += V_LANES) {
            vr top = v_set1(-INFINITY);
            for (int key = 0; key < keys; key++) {
                ptrdiff_t at = (ptrdiff_t)key * panel + lane;
                vr t = v_tanh(v_load(s + at) * scale * per_cap);
                if (gain) v_store(gain + at, v_set1(1) - t * t);
                v_store(s + at, cap * t);
                top = v_max(top, cap * t);
            }
            v_store(tile_max + lane, top);
        }
        if (how->terms == 0 && !sloped) return;
        scale = v_set1(1);
    }
    for (int t = 0; t < how->terms; t++) one_row[t] = is_one_row(&how->add[t]);
    for (int lane = 0; lane < panel; lane += V_LANES) {
        vr slope = {}, centre = {}, top = v_set1(-INFINITY);
        if (sloped) {
            slope = -v_load(slopes + lane);
            centre = v_load((const real *)how->centre + lane);
        }
        int first = how->terms > 0 && !one_row[0] ? terms_before_line(&how->add[0], lane) : 0;
        for (int key = 0, n = 0; key < keys; key += n) {
            vr add[2][V_LANES], distance = centre - v_set1((real)key);
            n = key == 0 && first > 0 ? first : V_LANES;
            n = keys - key < n ? keys - key : n;
            real *at = s + (ptrdiff_t)key * panel + lane;
            for (int t = 0; t < how->terms; t++)
                load_terms((real *)add[t], V_LANES, &how->add[t], one_row[t], lane, key, n);
#define ADD_TERMS(terms) add_terms(terms, add, at, panel, n, scale, sloped, slope, distance, top)
            top = how->terms == 0 ? ADD_TERMS(0) : how->terms == 1 ? ADD_TERMS(1) : ADD_TERMS(2);
        }
        v_store(tile_max + lane, top);
    }
}

// Scores become -inf where keep (NULL: nowhere) excludes them, and tile_max the largest left.
static void exclude(real *s, int panel, int keys, const uint32_t *keep, real *tile_max) {
    for (int lane = 0; lane < panel; lane += V_LANES) {
        vr top = v_set1(-INFINITY);
        for (int key = 0; key < keys; key++) {
            real *at = s + (ptrdiff_t)key * panel + lane;
            vr x = v_load(at);
            if (keep) v_store(at, x = v_choose(keep[key] >> lane, x, v_set1(-INFINITY)));
            top = v_max(top, x);
        }
        v_store(tile_max + lane, top);
    }
}

// Finishes scores as the product left them.
static void finish_scores(real *s, int panel, int keys, const uint32_t *keep, const fa_adjust *how,
                          real *tile_max) {
    if (how) adjust(s, panel, keys, how, tile_max);
    if (keep || !how) exclude(s, panel, keys, keep, tile_max);
}
