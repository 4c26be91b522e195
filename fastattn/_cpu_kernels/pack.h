// Operands packed as products take them, rows to memory, and dot products of rows. A part of
// tile.h.
#pragma once

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
// `words` copies n words of a row from column `col` on, zeros where the row has no more; the first
// `in_place` words need no copy.
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
                } else if (c0 + V_LANES <= in_place) {
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
    int in_place = src->stride == 2 ? src->cols / 2 : 0;
    int units = ((src->cols + 1) / 2 + SCORES_STEP - 1) / SCORES_STEP * SCORES_STEP;
    transpose_rows(dst, panel, src, units, in_place, pair_words, negate ? 0x80008000u : 0);
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
    transpose_rows(dst, panel, src, src->cols, native ? src->cols : 0, real_words,
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
