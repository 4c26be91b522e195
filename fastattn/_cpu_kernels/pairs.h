// Which pairs take part: masks, segments and dropout as bits of a tile. A part of tile.h.
#pragma once

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
