// The tile kernels of one ISA and one element type: the functions of fa_kernels (kernels.h).
// Compiled once for each pair by a small file that sets
//
//     FA_SET       the name of the set, fa_<isa>_<type>
//     FA_TYPE      "f32", "f64" or "bf16"
//     FA_DOUBLE    reals are double;   FA_BF16_PAIRS   units are pairs of bfloat16
//     FA_AMX       products of pairs by tiles (amx.h)
//     and, to depart from what suits most machines, any of the tile sizes below
//
// Everything here is static but the set itself: a helper compiled for one ISA can never be
// linked into the code of another.
//
// Bits: every element of a product is one chain of multiply-adds in the order of the summed
// axis, from zero, whatever the register tile around it (scores of few rows: a chain for each
// lane, and their sums added in one order); pairs that are excluded add an exact zero. So which
// rows share a panel, where a panel's keys start and end, and whether a row went through
// accumulate or accumulate_selected leaves no trace in the result.
#pragma once
#include "convert.h"
#include "kernels.h"
#include "vec.h"

// Query rows and keys of a tile: anything from 96 to 384 is within 3 % on Zen 5, as long as the
// tiles stay in the second level of the cache. On Zen 4 the forward gains 1 to 5 % (by AVX2 4 to 6 %)
// from 128 to 256 keys, and 0 to 1 % from there to 512; in the backward 128 or 192 rows (fill_job) by
// 96 to 256 keys are alike.
#ifndef FA_BR
#define FA_BR 128
#ifdef __AVX2__
#define FA_BC 256
#else
#define FA_BC 128
#endif
#define FA_BR_BACKWARD 128
#define FA_BC_BACKWARD 128
#endif
// Register tiles: as many accumulators as leave room for one row of right operands and a left one.
#if defined(__AVX512F__)  // 32 registers: 8 x 2 keys x panel, 6 x 4
#define FA_SCORES_MR 8
#define FA_ACCUMULATE_NR 4
#else                     // 16: 6 x 2, 6 x 2
#define FA_SCORES_MR 6
#define FA_ACCUMULATE_NR 2
#endif
#define ACCUMULATE_MR 6

#define NOINLINE static __attribute__((noinline))
#define UNROLL4 _Pragma("GCC unroll 4")
#define LOG2E 1.4426950408889634074

// ---- units: what one multiply-add takes ------------------------------------------------------
#ifdef FA_BF16_PAIRS
#define PAIR 2
typedef uint32_t unit;
typedef __m512i uv;
INLINE uv u_set1(const unit *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}
INLINE uv u_load(const unit *p) { return _mm512_loadu_si512(p); }
INLINE vr u_madd(vr c, uv a, uv b) {
    return (vr)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
// Halves of 16 elements each to one vector of pairs (low, high).
INLINE __m512i u_interleave(__m512i halves) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
}
// NR vectors of right operands from rows as they lie, ld apart.
INLINE void u_load_raw(const int NR, uv *to, const unit *row, ptrdiff_t ld) {
    if (NR == 1) {
        __m512i even = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)row));
        to[0] = u_interleave(_mm512_inserti64x4(even, _mm256_loadu_si256((const void *)(row + ld)), 1));
    }
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                         39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    UNROLL for (int j = 0; j + 1 < NR; j += 2) {
        __m512i even = u_load(row + j * V_LANES / 2), odd = u_load(row + ld + j * V_LANES / 2);
        to[j] = _mm512_permutex2var_epi16(even, low, odd);
        to[j + 1] = _mm512_permutex2var_epi16(even, high, odd);
    }
}
// Two vectors of floats to one of pairs.
INLINE __m512i u_pairs(vr low, vr high) {
    return u_interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#else
#define PAIR 1
typedef real unit;
typedef vr uv;
INLINE uv u_set1(const unit *p) {
    real x;
    memcpy(&x, p, sizeof x);
    return v_set1(x);
}
INLINE uv u_load(const unit *p) { return v_loadu(p); }
INLINE vr u_madd(vr c, uv a, uv b) { return v_fma(a, b, c); }
INLINE void u_load_raw(const int NR, uv *to, const unit *row, ptrdiff_t ld) {
    (void)ld;
    UNROLL for (int j = 0; j < NR; j++) to[j] = load_vector((const char *)(row + j * V_LANES / 2), FA_F16);
}
#endif
// The dtype of which they are.
#if defined(FA_BF16_PAIRS) && !defined(FA_AMX)
#define FA_RAW FA_BF16
#elif defined(__F16C__) && !defined(FA_DOUBLE) && !defined(FA_AMX)
#define FA_RAW FA_F16
#else
#define FA_RAW FA_NONE
#endif

// ---- packing ---------------------------------------------------------------------------------

// Of n reals, whole vectors. x - x is 0, and NaN where x is not finite; so is the sum.
static int row_finite(const void *x_, int n) {
    const real *x = x_;
    vr sum = {};
    for (int i = 0; i < n; i += V_LANES) {
        vr v = v_loadu(x + i);
        sum += v - v;
    }
    return v_bits(sum == sum) == (1u << V_LANES) - 1;
}

// Transposes words of a real's size: dst[col][panel] from rows that hold them side by side.
// `words` copies n words of a row from column `col` on, zeros where the row has no more.
typedef void words_fn(real *dst, const fa_rows *src, int row, int col, int n);

INLINE void transpose_rows(real *dst, int panel, const fa_rows *src, int cols, int in_place,
                           words_fn *words, ureal flip) {
    for (int r0 = 0; r0 < panel; r0 += V_LANES)
        for (int c0 = 0; c0 < cols; c0 += V_LANES) {
            int width = cols - c0 < V_LANES ? cols - c0 : V_LANES;
            vr block[V_LANES];
            for (int r = 0; r < V_LANES; r++) {
                if (r0 + r >= src->rows || !src->row[r0 + r]) {
                    block[r] = (vr){};
                } else if (in_place && width == V_LANES) {
                    block[r] = v_loadu((const real *)src->row[r0 + r] + c0);
                } else {
                    real part[V_LANES] __attribute__((aligned(V_BYTES))) = {0};
                    words(part, src, r0 + r, c0, width);
                    block[r] = v_load(part);
                }
            }
            v_transpose(block);
            for (int c = 0; c < width; c++)
                v_store(dst + (ptrdiff_t)(c0 + c) * panel + r0, (vr)((vu)block[c] ^ flip));
        }
}

INLINE void fetch_ahead(const fa_rows *src, int r) {
    if (src->ahead && src->stride == dtype_bytes(src->dtype))
        for (ptrdiff_t c = 0; c < src->cols * src->stride; c += 64)
            fetch_line(src->row[r + src->ahead] + c);
}

#ifdef FA_BF16_PAIRS
INLINE uint16_t half_at(const fa_rows *src, int row, int col) {
    uint16_t h = 0;
    if (row < src->rows && col < src->cols && src->row[row])
        memcpy(&h, src->row[row] + col * src->stride, 2);
    return h;
}
static void pair_words(real *dst, const fa_rows *src, int row, int col, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t pair = half_at(src, row, 2 * (col + i)) | (uint32_t)half_at(src, row, 2 * (col + i) + 1) << 16;
        memcpy(dst + i, &pair, 4);
    }
}
static void pack_lanes(void *dst, int panel, const fa_rows *src, int negate) {
    int in_place = src->stride == 2 && src->cols % 2 == 0;
    transpose_rows(dst, panel, src, (src->cols + 1) / 2, in_place, pair_words,
                   negate ? 0x80008000u : 0);
}
static void pack_left(void *dst_, ptrdiff_t ld, const fa_rows *src) {
    uint16_t *dst = dst_;
    for (int r = 0; r < src->rows; r++, dst += 2 * ld) {
        int c = 0;
        fetch_ahead(src, r);
        if (src->stride == 2 && src->row[r]) {
            memcpy(dst, src->row[r], (size_t)src->cols * 2);
            c = src->cols;
        }
        for (; c < 2 * ld; c++) dst[c] = half_at(src, r, c);
    }
}
static void pack_right(void *dst_, ptrdiff_t ld, const fa_rows *src) {
    uint16_t *dst = dst_;
    __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                   39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int r = 0; r < src->rows; r += 2, dst += 2 * ld) {
        const char *even = src->row[r], *odd = r + 1 < src->rows ? src->row[r + 1] : 0;
        fetch_ahead(src, r);
        fetch_ahead(src, odd ? r + 1 : r);
        for (int c = 0; c < ld; c += 32) {
            int n = src->cols - c;
            __mmask32 in = src->stride != 2 || n <= 0 ? 0 : n < 32 ? (1u << n) - 1 : ~0u;
            __m512i a = _mm512_maskz_loadu_epi16(even ? in : 0, even + 2 * c);
            __m512i b = _mm512_maskz_loadu_epi16(odd ? in : 0, odd + 2 * c);
            _mm512_storeu_si512(dst + 2 * c, _mm512_permutex2var_epi16(a, low, b));
            if (c + 16 < ld) _mm512_storeu_si512(dst + 2 * c + 32, _mm512_permutex2var_epi16(a, high, b));
        }
        if (src->stride != 2)
            for (int c = 0; c < src->cols; c++) {
                dst[2 * c] = half_at(src, r, c);
                dst[2 * c + 1] = half_at(src, r + 1, c);
            }
    }
}
static int right_finite(const void *b_, ptrdiff_t ld, int rows, int cols) {
    const uint16_t *b = b_;
    uint16_t worst = 0;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2 * cols; c++) {
            uint16_t magnitude = b[2 * r * ld + c] & 0x7fff;
            worst = magnitude > worst ? magnitude : worst;
        }
    return worst < 0x7f80;
}
#else
static void real_words(real *dst, const fa_rows *src, int row, int col, int n) {
    load_row(dst, src->row[row] + col * src->stride, src->stride, n, src->dtype);
}
static void pack_lanes(void *dst, int panel, const fa_rows *src, int negate) {
    int native = src->dtype == NATIVE && src->stride == sizeof(real);
    transpose_rows(dst, panel, src, src->cols, native, real_words,
                   negate ? (ureal)1 << (8 * sizeof(real) - 1) : 0);
}
static void pack_right(void *dst_, ptrdiff_t ld, const fa_rows *src) {
    const int native = src->dtype == NATIVE && src->stride == sizeof(real) && ld % V_LANES == 0;
    real *dst = dst_;
    for (int r = 0; r < src->rows; r++, dst += ld) {
        int n = src->row[r] ? src->cols : 0;
        fetch_ahead(src, r);
        if (native) {
            const real *row = (const real *)src->row[r];
            int c = 0;
            for (; c + V_LANES <= n; c += V_LANES) v_storeu(dst + c, v_loadu(row + c));
            for (; c < ld; c += V_LANES) v_storeu(dst + c, c < n ? v_load_part(row + c, n - c) : (vr){});
        } else {
            if (n) load_row(dst, src->row[r], src->stride, n, src->dtype);
            memset(dst + n, 0, (size_t)(ld - n) * sizeof(real));
        }
    }
}
static void pack_left(void *dst, ptrdiff_t ld, const fa_rows *src) { pack_right(dst, ld, src); }
static int right_finite(const void *b, ptrdiff_t ld, int rows, int cols) {
    int finite = 1;
    for (int r = 0; r < rows; r++) finite &= row_finite((const real *)b + r * ld, cols);
    return finite;
}
#endif

static void store_row(char *dst, ptrdiff_t stride, int dtype, const void *src_, int n, double factor_) {
    const real *src = src_;
    real factor = (real)factor_;
    int i = 0;
    if (stride == sizeof(real) && dtype == NATIVE)
        for (; i + V_LANES <= n; i += V_LANES)
            v_storeu((real *)(dst + i * stride), v_loadu(src + i) * v_set1(factor) + (vr){});
#if defined(__AVX512BF16__) && !defined(FA_DOUBLE)
    if (stride == 2 && dtype == FA_BF16)
        for (; i + 16 <= n; i += 16)
            _mm256_storeu_si256((void *)(dst + i * stride),
                                (__m256i)_mm512_cvtneps_pbh((__m512)(v_loadu(src + i) * v_set1(factor) + (vr){})));
#endif
    for (; i < n; i++) store_one(dst + i * stride, dtype, src[i] * factor + 0);
}

// n <= DOT_STEP elements of a row as whole vectors of reals: where they lie, or in `copy`.
#define DOT_STEP 64
INLINE const real *row_vectors(real *copy, const char *src, ptrdiff_t stride, int n, int dtype) {
    if (n % V_LANES == 0 && stride == sizeof(real) && dtype == (sizeof(real) == 8 ? FA_F64 : FA_F32))
        return (const real *)src;
    load_row(copy, src, stride, n, dtype);
    for (int i = n; i % V_LANES; i++) copy[i] = 0;
    return copy;
}
static double dot(const char *a, ptrdiff_t a_stride, int a_dtype, const char *b, ptrdiff_t b_stride,
                  int b_dtype, int n) {
    real a_copy[DOT_STEP], b_copy[DOT_STEP];
    vr sum = {};
    for (int i = 0; i < n; i += DOT_STEP) {
        int m = n - i < DOT_STEP ? n - i : DOT_STEP;
        const real *x = row_vectors(a_copy, a + i * a_stride, a_stride, m, a_dtype);
        const real *y = row_vectors(b_copy, b + i * b_stride, b_stride, m, b_dtype);
        for (int k = 0; k < m; k += V_LANES) sum = v_fma(v_loadu(x + k), v_loadu(y + k), sum);
    }
    double total[V_LANES];
    UNROLL for (int k = 0; k < V_LANES; k++) total[k] = (double)sum[k];
    UNROLL for (int half = V_LANES / 2; half > 0; half /= 2)
        UNROLL for (int k = 0; k < half; k++) total[k] += total[k + half];
    return total[0];
}

// ---- scores are finished ---------------------------------------------------------------------

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

// ---- products --------------------------------------------------------------------------------

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

static void scores(void *s, int panel, const void *k, ptrdiff_t ldk, const void *q, int keys, int depth,
                   const uint32_t *keep, const fa_adjust *how, void *tile_max) {
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
            if (panel == V_LANES)  // as many rows of q take keys no slower than they come from memory
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

#ifndef FA_AMX
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

static void accumulate(const fa_product *x) {
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

#endif

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

// ---- scores to probabilities -----------------------------------------------------------------

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

static int backward_tile(const fa_backward_tile *x, int panel, int keys) {
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
                v_store(dp + at, t);
                ds[half] = gain ? v_select(lost, (vr){}, t * v_load(gain + at)) : t;
                p[half] = dropped(prob, drop, j, lane, drop_scale);
            }
            store_gradients(to, lane, rows, p, ds);
        }
    }
    return v_bits((vi)any_lost) != 0;
}

#ifdef FA_AMX
// Scores leave the tiles' registers by memory.
static int backward_plain(const fa_backward_tile *x, int panel, int keys) {
    real top[FA_MAX_PANEL] __attribute__((aligned(V_BYTES)));
    scores(x->s, panel, x->k, x->ldk, x->q, keys, x->D, NULL, NULL, top);
    fetch_some(x->fetch, x->fetches, keys * x->fetch_rows);
    return backward_tile(x, panel, keys);
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
    if (before > 0) scores(x->s, panel, x->k, x->ldk, x->q, keys, before, NULL, NULL, top);
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

// ---- which pairs take part -------------------------------------------------------------------

static void keep_above_neg_inf(uint32_t *keep, const void *tile_, int panel, int keys) {
    const real *tile = tile_;
    for (int key = 0; key < keys; key++)
        for (int lane = 0; lane < panel; lane += V_LANES)
            keep[key] &= ~(v_bits(v_load(tile + (ptrdiff_t)key * panel + lane) == v_set1(-INFINITY)) << lane);
}

static int all_neg_inf(const fa_rows *x, int start, int end) {
    int one_row = is_one_row(x);
    for (int r = 0; r < (one_row ? 1 : x->rows); r++)
        for (int col = start; col < end; col += V_LANES) {
            real part[V_LANES] __attribute__((aligned(V_BYTES)));
            int n = end - col < V_LANES ? end - col : V_LANES;
            for (int i = n; i < V_LANES; i++) part[i] = -INFINITY;
            load_row(part, x->row[r] + col * x->stride, x->stride, n, x->dtype);
            if (v_bits(v_load(part) != v_set1(-INFINITY))) return 0;
        }
    return 1;
}
static void cut_neg_inf(const fa_rows *x, int *start_, int *end_) {
    int start = *start_, end = *end_, last;
    while (start < end && all_neg_inf(x, start, start + FA_RUN < end ? start + FA_RUN : end)) start += FA_RUN;
    while (start < end && all_neg_inf(x, last = (end - 1) / FA_RUN * FA_RUN, end)) end = last;
    *start_ = start;
    *end_ = end;
}

// Bit j: whether byte j of n <= 64 is not 0.
INLINE uint64_t true_bits(const char *m, ptrdiff_t stride, int n) {
    uint64_t bits = 0;
#ifdef __AVX512BW__
    if (stride == 1) {
        __m512i x = _mm512_maskz_loadu_epi8(~0ull >> (64 - n), m);
        return _mm512_test_epi8_mask(x, x);
    }
#endif
    int j = 0;
    if (stride == 1 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
        for (; j + 8 <= n; j += 8) {
            uint64_t x;
            memcpy(&x, m + j, 8);
            x |= x >> 4 & 0x0f0f0f0f0f0f0f0fu;  // each byte to its lowest bit
            x |= x >> 2 & 0x0303030303030303u;
            x |= x >> 1;
            bits |= ((x & 0x0101010101010101u) * 0x0102040810204080u >> 56) << j;
        }
    for (; j < n; j++) bits |= (uint64_t)(m[j * stride] != 0) << j;
    return bits;
}

// Swaps rows and columns of 32 words of 32 bits: the halves, then the quarters, ... Pairs of words
// are always 16 apart, since each step shuffles the words so that the next ones are.
static void transpose_bits(uint32_t *x) {
    UNROLL for (int half = 16; half > 0; half /= 2) {
        const uint32_t low = ~0u / ((1u << half) + 1);
        uint32_t y[32];
        for (int i = 0; i < 16; i++) {
            uint32_t t = (x[i] >> half ^ x[i + 16]) & low;
            y[2 * i] = x[i] ^ t << half;
            y[2 * i + 1] = x[i + 16] ^ t;
        }
        memcpy(x, y, sizeof y);
    }
}

static void keep_true(uint32_t *keep, const fa_rows *mask) {
    int shared = is_one_row(mask);  // a mask of keys alone
    for (int j = 0; j < mask->cols; j += 64) {  // a line of the cache
        uint32_t x[2][32] = {0};
        int n = mask->cols - j < 64 ? mask->cols - j : 64;
        for (int r = 0; r < (shared ? 1 : mask->rows); r++) {
            const char *at = mask->row[r] + j * mask->stride;
            uint64_t bits = true_bits(at, mask->stride, n);
            x[0][r] = (uint32_t)bits;
            x[1][r] = (uint32_t)(bits >> 32);
            __builtin_prefetch(at + mask->cols * mask->stride);  // the next tile
        }
        for (int half = 0; 32 * half < n; half++) {
            const uint32_t bits = x[half][0];
            if (shared)
                for (int i = 0; i < 32; i++) x[half][i] = -(bits >> i & 1);
            else
                transpose_bits(x[half]);
            for (int i = 32 * half; i < n && i < 32 * half + 32; i++) keep[j + i] &= x[half][i % 32];
        }
    }
}

static void seen_units(int32_t *start, int32_t *end, const uint32_t *keep, int keys, int rows) {
    const uint32_t all = (uint32_t)((1ull << rows) - 1);
    uint32_t seen = 0;
    for (int r = 0; r < FA_MAX_PANEL; r++) {
        start[r] = keys;
        end[r] = 0;
    }
    for (int j = 0; j < keys && seen != all; j++) {
        uint32_t fresh = keep[j] & ~seen;
        if (!fresh) continue;
        for (int r = 0; r < FA_MAX_PANEL; r++) start[r] = fresh >> r & 1 ? j / PAIR : start[r];
        seen |= fresh;
    }
    seen = 0;
    for (int j = keys - 1; j >= 0 && seen != all; j--) {
        uint32_t fresh = keep[j] & ~seen;
        if (!fresh) continue;
        for (int r = 0; r < FA_MAX_PANEL; r++) end[r] = fresh >> r & 1 ? j / PAIR + 1 : end[r];
        seen |= fresh;
    }
}

// Philox4x32-7 (Salmon et al., SC 2011), one counter a lane: (key // 4, row, head, batch).
#define PHILOX_0 0xD2511F53u
#define PHILOX_1 0xCD9E8D57u
#define PHILOX_KEY_0 0x9E3779B9u
#define PHILOX_KEY_1 0xBB67AE85u
#ifdef __AVX512F__
// Low and high words of factor times each word.
INLINE __m512i wide_product(__m512i x, uint32_t factor, __m512i *high) {
    __m512i f = _mm512_set1_epi64(factor);
    __m512i even = _mm512_mul_epu32(x, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
    *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
static void dropout(uint32_t *bits, int panel, int keys, int64_t key0, const uint32_t *row,
                    const uint32_t *head, uint32_t batch, uint64_t seed, uint64_t threshold) {
    memset(bits, 0, (size_t)keys * sizeof *bits);
    if (threshold > UINT32_MAX) return;
    for (int lane = 0; lane < panel; lane += 16) {
        __mmask16 lanes = panel - lane < 16 ? (1u << (panel - lane)) - 1 : 0xffff;
        __m512i rows = _mm512_maskz_loadu_epi32(lanes, row + lane);
        __m512i heads = _mm512_maskz_loadu_epi32(lanes, head + lane);
        for (int j = 0; j < keys; j += 4) {
            uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
            __m512i x[4] = {_mm512_set1_epi32((int)((key0 + j) / 4)), rows, heads,
                            _mm512_set1_epi32((int)batch)};
            UNROLL for (int round = 0; round < 7; round++, k0 += PHILOX_KEY_0, k1 += PHILOX_KEY_1) {
                __m512i a_high, b_high, a = wide_product(x[0], PHILOX_0, &a_high);
                __m512i b = wide_product(x[2], PHILOX_1, &b_high);
                x[0] = b_high ^ x[1] ^ _mm512_set1_epi32((int)k0);
                x[2] = a_high ^ x[3] ^ _mm512_set1_epi32((int)k1);
                x[1] = b;
                x[3] = a;
            }
            for (int w = 0; w < 4 && j + w < keys; w++) {
                __m512i least = _mm512_set1_epi32((int)(uint32_t)threshold);
                bits[j + w] |= (uint32_t)_mm512_mask_cmpge_epu32_mask(lanes, x[w], least) << lane;
            }
        }
    }
}
#else
static void dropout(uint32_t *bits, int panel, int keys, int64_t key0, const uint32_t *row,
                    const uint32_t *head, uint32_t batch, uint64_t seed, uint64_t threshold) {
    for (int j = 0; j < keys; j += 4) {
        uint32_t x[4][FA_MAX_PANEL], k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int i = 0; i < panel; i++) {
            x[0][i] = (uint32_t)((key0 + j) / 4);
            x[1][i] = row[i];
            x[2][i] = head[i];
            x[3][i] = batch;
        }
        for (int round = 0; round < 7; round++, k0 += PHILOX_KEY_0, k1 += PHILOX_KEY_1)
            for (int i = 0; i < panel; i++) {
                uint64_t a = (uint64_t)PHILOX_0 * x[0][i], b = (uint64_t)PHILOX_1 * x[2][i];
                x[0][i] = (uint32_t)(b >> 32) ^ x[1][i] ^ k0;
                x[2][i] = (uint32_t)(a >> 32) ^ x[3][i] ^ k1;
                x[1][i] = (uint32_t)b;
                x[3][i] = (uint32_t)a;
            }
        for (int w = 0; w < 4 && j + w < keys; w++) {
            uint32_t kept = 0;
            for (int i = 0; i < panel; i++) kept |= (uint32_t)(x[w][i] >= threshold) << i;
            bits[j + w] = kept;
        }
    }
}
#endif

// ---- the machine's own limit -----------------------------------------------------------------

#ifndef FA_AMX
static double peak(int64_t iterations, double *sink) {
    enum { CHAINS = 12 };
    vr c[CHAINS];
    unit values[2 * V_LANES];
    memset(values, 0, sizeof values);
    uv a = u_load(values), b = u_load(values + V_LANES);
    for (int i = 0; i < CHAINS; i++) c[i] = v_set1((real)i);
    for (int64_t n = 0; n < iterations; n++) {
        UNROLL for (int i = 0; i < CHAINS; i++) c[i] = u_madd(c[i], a, b);
        __asm__ volatile("" : "+x"(a), "+x"(b));  // a new value each time, as far as one can see
    }
    for (int i = 1; i < CHAINS; i++) c[0] += c[i];
    *sink += (double)c[0][0];
    return (double)iterations * CHAINS * V_LANES * PAIR * 2;
}
#endif

const fa_kernels FA_SET = {
    .type = FA_TYPE,
    .real_bytes = sizeof(real),
    .unit_bytes = sizeof(unit),
    .pair = PAIR,
    .lanes = V_LANES,
    .Br = FA_BR,
    .Bc = FA_BC,
    .Br_backward = FA_BR_BACKWARD,
    .Bc_backward = FA_BC_BACKWARD,
    .MR = ACCUMULATE_MR,
    .NR = FA_ACCUMULATE_NR,
    .raw = FA_RAW,
    .pack_lanes = pack_lanes,
    .pack_left = pack_left,
    .pack_right = pack_right,
    .store_row = store_row,
    .dot = dot,
    .scores = scores,
    .few_scores = few_scores,
    .softmax = softmax,
    .accumulate = accumulate,
    .merge = merge,
    .accumulate_selected = accumulate_selected,
    .right_finite = right_finite,
    .row_finite = row_finite,
    .backward_tile = backward_tile,
    .backward_plain = backward_plain,
    .add_tile = add_tile,
    .add_distances = add_distances,
    .keep_above_neg_inf = keep_above_neg_inf,
    .cut_neg_inf = cut_neg_inf,
    .keep_true = keep_true,
    .seen_units = seen_units,
    .dropout = dropout,
    .peak = peak,
};
