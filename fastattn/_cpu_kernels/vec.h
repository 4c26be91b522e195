// Vectors of reals: GCC/Clang vector extensions, with an intrinsic only where the extensions
// have no word for the instruction. The width follows from the flags this file is compiled
// with; FA_DOUBLE chooses double instead of float.
//
//     vr, vi         vectors of reals, and of integers of the same width (masks: 0 or -1)
//     V_LANES        reals in a vector
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define V_BYTES 64
#elif defined(__AVX2__)
#define V_BYTES 32
#else
#define V_BYTES 16
#endif

#ifdef FA_DOUBLE
typedef double real;
typedef int64_t ireal;
typedef uint64_t ureal;
#else
typedef float real;
typedef int32_t ireal;
typedef uint32_t ureal;
#endif
#define V_LANES (V_BYTES / (int)sizeof(real))

typedef real vr __attribute__((vector_size(V_BYTES)));
typedef ireal vi __attribute__((vector_size(V_BYTES)));
typedef ureal vu __attribute__((vector_size(V_BYTES)));
typedef real vr_any __attribute__((vector_size(V_BYTES), aligned(1), may_alias));
typedef real vr_own __attribute__((vector_size(V_BYTES), may_alias));

#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 16")

// Asks for a line into the second level of the cache. To GCC its builtin reads and writes any memory:
// a loop with one in it would store its sums at every turn.
INLINE void fetch_line(const void *p) {
#ifdef __x86_64__
    __asm__ volatile("prefetcht1 (%0)" : : "r"(p));
#else
    __builtin_prefetch(p, 0, 2);
#endif
}

// x - 0, not 0 + x: 0 + (-0.) is +0., so only the first is a plain broadcast.
INLINE vr v_set1(real x) { return x - (vr){}; }
INLINE vi v_set1i(ireal x) { return x - (vi){}; }
INLINE vr v_load(const real *p) { return *(const vr_own *)p; }
INLINE vr v_loadu(const real *p) { return *(const vr_any *)p; }
INLINE void v_store(real *p, vr x) { *(vr_own *)p = x; }
INLINE void v_storeu(real *p, vr x) { *(vr_any *)p = x; }
INLINE vr v_select(vi mask, vr yes, vr no) { return (vr)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vr v_abs(vr x) { return (vr)((vu)x & (((vu){} - 1) >> 1)); }

#if defined(__AVX512F__)
#ifdef FA_DOUBLE
#define V_X86(name) _mm512_##name##_pd
typedef __m512d v_x86;
#else
#define V_X86(name) _mm512_##name##_ps
typedef __m512 v_x86;
#endif
#elif defined(__AVX2__)
#ifdef FA_DOUBLE
#define V_X86(name) _mm256_##name##_pd
typedef __m256d v_x86;
#else
#define V_X86(name) _mm256_##name##_ps
typedef __m256 v_x86;
#endif
#elif defined(__SSE2__)
#ifdef FA_DOUBLE
#define V_X86(name) _mm_##name##_pd
typedef __m128d v_x86;
#else
#define V_X86(name) _mm_##name##_ps
typedef __m128 v_x86;
#endif
#endif

// The first n < V_LANES of a vector, and zeros.
INLINE vr v_load_part(const real *p, int n) {
#ifdef __AVX512F__
    return (vr)V_X86(maskz_loadu)((1u << n) - 1, p);
#else
    real part[V_LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof(real));
    return v_loadu(part);
#endif
}

// Both return b where either is NaN: with the running value as a, a NaN score may be lost
// from a maximum (its sum still carries it); with a bound as a, a NaN comes through.
INLINE vr v_max(vr a, vr b) {
#ifdef V_X86
    return (vr)V_X86(max)((v_x86)a, (v_x86)b);
#else
    return v_select(a > b, a, b);
#endif
}
INLINE vr v_min(vr a, vr b) {
#ifdef V_X86
    return (vr)V_X86(min)((v_x86)a, (v_x86)b);
#else
    return v_select(a < b, a, b);
#endif
}

// a b + c, with one rounding where the ISA has it. Not left to the compiler, which contracts some
// chains and not others (GCC's avoid-fma-max-bits): every kernel has to round alike.
INLINE vr v_fma(vr a, vr b, vr c) {
#ifdef __FMA__
    return (vr)V_X86(fmadd)((v_x86)a, (v_x86)b, (v_x86)c);
#else
    return a * b + c;
#endif
}

// One bit a lane, from and to a mask.
INLINE uint32_t v_bits(vi mask) {
#if defined(__AVX512DQ__) && defined(FA_DOUBLE)
    return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(V_X86)
    return (uint32_t)V_X86(movemask)((v_x86)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < V_LANES; i++) bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
#endif
}
INLINE vi v_mask(uint32_t bits) {
#if defined(__AVX512DQ__) && defined(FA_DOUBLE)
    return (vi)_mm512_movm_epi64((__mmask8)bits);
#elif defined(__AVX512DQ__)
    return (vi)_mm512_movm_epi32((__mmask16)bits);
#else
    vi lane;
    for (int i = 0; i < V_LANES; i++) lane[i] = (ireal)1 << i;
    return (v_set1i((ireal)bits) & lane) != 0;
#endif
}
// Lanes of `yes` where a bit says so, else of `no`.
INLINE vr v_choose(uint32_t bits, vr yes, vr no) {
#ifdef __AVX512F__
    return (vr)V_X86(mask_blend)(bits, (v_x86)no, (v_x86)yes);
#else
    return v_select(v_mask(bits), yes, no);
#endif
}
// x, and -inf where y is.
INLINE vr v_below(vr x, vr y) {
    const vr low = v_set1(-INFINITY);
#if defined(__AVX512F__) && defined(FA_DOUBLE)
    return (vr)_mm512_mask_mov_pd((__m512d)x, _mm512_cmp_pd_mask((__m512d)y, (__m512d)low, 0), (__m512d)low);
#elif defined(__AVX512F__)
    return (vr)_mm512_mask_mov_ps((__m512)x, _mm512_cmp_ps_mask((__m512)y, (__m512)low, 0), (__m512)low);
#else
    return v_select(y == low, low, x);
#endif
}

// Transposes a V_LANES x V_LANES block held in registers: log2(V_LANES) perfect shuffles of
// the rows each turn the index (row, lane) by one bit, and all of them swap its halves.
#if V_BYTES / 4 == 16
#define V_LO32 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define V_HI32 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define V_LO64 0, 8, 1, 9, 2, 10, 3, 11
#define V_HI64 4, 12, 5, 13, 6, 14, 7, 15
#elif V_BYTES / 4 == 8
#define V_LO32 0, 8, 1, 9, 2, 10, 3, 11
#define V_HI32 4, 12, 5, 13, 6, 14, 7, 15
#define V_LO64 0, 4, 1, 5
#define V_HI64 2, 6, 3, 7
#else
#define V_LO32 0, 4, 1, 5
#define V_HI32 2, 6, 3, 7
#define V_LO64 0, 2
#define V_HI64 1, 3
#endif
#ifdef FA_DOUBLE
#define V_LO V_LO64
#define V_HI V_HI64
#else
#define V_LO V_LO32
#define V_HI V_HI32
#endif
#ifdef __clang__
#define V_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define V_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
INLINE void v_transpose(vr r[V_LANES]) {
    UNROLL for (int stage = 1; stage < V_LANES; stage *= 2) {
        vr t[V_LANES];
        UNROLL for (int i = 0; i < V_LANES / 2; i++) {
            t[2 * i] = V_SHUFFLE(r[i], r[i + V_LANES / 2], V_LO);
            t[2 * i + 1] = V_SHUFFLE(r[i], r[i + V_LANES / 2], V_HI);
        }
        UNROLL for (int i = 0; i < V_LANES; i++) r[i] = t[i];
    }
}

// The sums over the lanes of V_LANES vectors: lane i is that of r[i]. Destroys r.
INLINE vr v_sums(vr r[V_LANES]) {
    UNROLL for (int half = V_LANES / 2; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; i++)
            r[i] = V_SHUFFLE(r[i], r[i + half], V_LO) + V_SHUFFLE(r[i], r[i + half], V_HI);
    return r[0];
}

// Powers of two. x = n + f with n an integer and |f| <= 1/2; 2^f = 1 + f q(f), q the polynomial
// that minimises the relative error of 2^f - 1 (Remez exchange in 200-bit arithmetic): 1.1e-8 for
// float, 1.8e-17 for double.
#define HORNER_BEGIN(c) vr q = v_set1((real)(c))
#define HORNER(c) q = v_fma(q, f, v_set1((real)(c)))
INLINE vr v_pow2_poly(vr f) {
#ifdef FA_DOUBLE
    HORNER_BEGIN(0x1.e8cab7c976947p-32);
    HORNER(0x1.e605d28b72567p-28);
    HORNER(0x1.b525a09339debp-24);
    HORNER(0x1.62bfd4b4adf2bp-20);
    HORNER(0x1.ffcbfc1ea37c7p-17);
    HORNER(0x1.4309130958e77p-13);
    HORNER(0x1.5d87fe78b211ap-10);
    HORNER(0x1.3b2ab6fba1e40p-7);
    HORNER(0x1.c6b08d704a08ep-5);
    HORNER(0x1.ebfbdff82c598p-3);
    HORNER(0x1.62e42fefa39efp-1);
#else
    HORNER_BEGIN(0x1.4308fap-13);
    HORNER(0x1.5f07b4p-10);
    HORNER(0x1.3b2ba0p-7);
    HORNER(0x1.c6af6ep-5);
    HORNER(0x1.ebfbdep-3);
    HORNER(0x1.62e430p-1);
#endif
    return q;
}

#ifdef FA_DOUBLE
#define V_MAGIC 0x1.8p52  // adding it leaves the rounded integer in the low bits
#define V_MANTISSA 52
#define V_BIAS 1023
#else
#define V_MAGIC 0x1.8p23f
#define V_MANTISSA 23
#define V_BIAS 127
#endif
// n = round(x) and 2^n; x within +-V_BIAS or NaN. 2^-V_BIAS comes out as 0.
INLINE vr v_round_pow2(vr x, vr *pow2) {
    vr t = x + v_set1(V_MAGIC);
    *pow2 = (vr)(((vi)t + V_BIAS) << V_MANTISSA);
    return t - v_set1(V_MAGIC);
}
// 2^(c x) for c x <= 0, c > 0: exactly 1 at 0 and exactly 0 at -inf, where it would be subnormal
// anything between 0 and the least normal number; NaN comes through. f is taken from x itself, so
// that the rounding of c x does not count.
#if defined(__AVX512F__)
// Two registers hold a table of 2^(i / V_STEPS), a step of V_STEPS to the unit leaves |f| so small that
// few terms suffice: 1 + f q(f) to 5.3e-8 for float, 7e-18 for double. An entry lacks the i that is
// added to its bits with the integer part.
#ifdef FA_DOUBLE
#define V_STEPS 16
static const ureal v_pow2_steps[V_STEPS] __attribute__((aligned(V_BYTES))) = {
    0x3ff0000000000000, 0x3fefb5586cf9890f, 0x3fef72b83c7d517b, 0x3fef387a6e756238,
    0x3fef06fe0a31b715, 0x3feedea64c123422, 0x3feebfdad5362a27, 0x3feeab07dd485429,
    0x3feea09e667f3bcd, 0x3feea11473eb0187, 0x3feeace5422aa0db, 0x3feec49182a3f090,
    0x3feee89f995ad3ad, 0x3fef199bdd85529c, 0x3fef5818dcfba487, 0x3fefa4afa2a490da,
};
#else
#define V_STEPS 32
static const ureal v_pow2_steps[V_STEPS] __attribute__((aligned(V_BYTES))) = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
};
#endif
INLINE vr v_exp2(vr x, vr c) {
    const vr magic = v_set1(V_MAGIC / V_STEPS), *steps = (const vr *)v_pow2_steps;
    x = v_max(v_set1(-V_BIAS) / c, x);
    vr t = v_fma(x, c, magic), f = v_fma(x, c, magic - t);
    vr pow2 = (vr)V_X86(permutex2var)((v_x86)steps[0], (__m512i)t, (v_x86)steps[1]);
    pow2 = (vr)((vi)pow2 + (vi)((vu)t << (V_MANTISSA - __builtin_ctz(V_STEPS))));
#ifdef FA_DOUBLE
    HORNER_BEGIN(0x1.430818ad73e5ap-13);
    HORNER(0x1.5d89bdcd026fap-10);
    HORNER(0x1.3b2ab6fe272c3p-7);
    HORNER(0x1.c6b08d6e8ba08p-5);
    HORNER(0x1.ebfbdff82c553p-3);
    HORNER(0x1.62e42fefa39fdp-1);
#else
    HORNER_BEGIN(0x1.ebfbdep-3);
    HORNER(0x1.62e584p-1);
#endif
    return v_fma(pow2 * f, q, pow2);
}
#else
INLINE vr v_exp2(vr x, vr c) {
    vr pow2;
    x = v_max(v_set1(-V_BIAS) / c, x);
    vr f = v_fma(x, c, -v_round_pow2(x * c, &pow2));
    return v_fma(f, v_pow2_poly(f), v_set1(1)) * pow2;
}
#endif
// tanh x = e / (e + 2) with e = exp(2|x|) - 1, taken without cancellation.
INLINE vr v_tanh(vr x) {
    vr pow2, y = v_min(v_set1(64), v_abs(x) * v_set1((real)2.885390081777926814720));
    vr f = y - v_round_pow2(y, &pow2);
    vr e = v_fma(pow2, f * v_pow2_poly(f), pow2 - v_set1(1));
    vr t = e / (e + v_set1(2));
    return (vr)((vu)t | ((vu)x ^ (vu)v_abs(x)));
}
