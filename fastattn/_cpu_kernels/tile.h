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
#if defined(FA_BF16_PAIRS)
#define FA_RAW FA_BF16
#elif defined(__F16C__) && !defined(FA_DOUBLE)
#define FA_RAW FA_F16
#else
#define FA_RAW FA_NONE
#endif

// What the summed axis of scores, in units, is a multiple of.
#ifdef FA_AMX
#define SCORES_STEP 16
#else
#define SCORES_STEP 1
#endif

// In the order of use: each reads what the ones before it declare.
#include "pack.h"
#include "adjust.h"
#include "products.h"
#include "softmax.h"
#include "backward.h"
#include "pairs.h"

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
    .scores_step = SCORES_STEP,
    .raw = FA_RAW,
#ifdef FA_AMX
    .enter = enter,
    .leave = leave,
    .pack_turned = pack_turned,
    .accumulate_turned = accumulate_turned,
    .turn_back = turn_back,
#endif
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
