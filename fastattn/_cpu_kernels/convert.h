// Elements of any dtype to reals and back, one rounding (to nearest, ties to even) each way.
#pragma once
#include "kernels.h"
#include "vec.h"

INLINE float f32_from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
INLINE uint32_t f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
INLINE float from_bf16(uint16_t h) { return f32_from_bits((uint32_t)h << 16); }
INLINE uint16_t to_bf16(float f) {
    uint32_t u = f32_bits(f);
    uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return (uint16_t)(f == f ? rounded : (u >> 16 | 0x40));
}
// The bits of a half, shifted into place, are the float's but for the exponent's bias: one
// exact multiplication by 2^112 mends it, subnormals included.
INLINE float from_f16(uint16_t h) {
#ifdef __F16C__
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    float f = f32_from_bits(magnitude << 13) * 0x1p112f;
    uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0;
    return f32_from_bits(f32_bits(f) | special | sign);
#endif
}
INLINE uint16_t to_f16(float f) {
#ifdef __F16C__
    return _cvtss_sh(f, 0);
#else
    uint32_t u = f32_bits(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to 65536 or more
    if (magnitude < 0x38800000)  // subnormal: the sum rounds at the half's last place, 2^-24
        return (uint16_t)(sign | (f32_bits(f32_from_bits(magnitude) + 0.5f) - 0x3f000000));
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((magnitude >> 13) - (112 << 10)));
#endif
}
// Through float from double: rounded to odd on the way, so that the second rounding is right.
INLINE float odd_f32(double x) {
    float f = (float)x;
    if ((double)f != x && x == x && f32_bits(f) << 1 != 0xff000000u) {
        uint32_t u = f32_bits(f);
        if ((u & 1) == 0) u += fabs((double)f) < fabs(x) ? 1 : -1;
        f = f32_from_bits(u);
    }
    return f;
}

#define NATIVE (sizeof(real) == 8 ? FA_F64 : FA_F32)
INLINE int dtype_bytes(int dtype) { return dtype == FA_F64 ? 8 : dtype == FA_F32 ? 4 : 2; }

INLINE real load_one(const char *p, int dtype) {
    uint16_t h;
    float f;
    double d;
    switch (dtype) {
    case FA_F16: memcpy(&h, p, 2); return from_f16(h);
    case FA_BF16: memcpy(&h, p, 2); return from_bf16(h);
    case FA_F32: memcpy(&f, p, 4); return (real)f;
    default: memcpy(&d, p, 8); return (real)d;
    }
}

// dst[0:n] = n elements at src, stride bytes apart.
static inline void load_row(real *restrict dst, const char *restrict src, ptrdiff_t stride, int n,
                            int dtype) {
    int i = 0;
    if (stride == dtype_bytes(dtype)) {
        if (stride == sizeof(real) && dtype >= FA_F32) {
            memcpy(dst, src, (size_t)n * sizeof(real));
            return;
        }
        const uint16_t *h = (const uint16_t *)src;
#if defined(__AVX512F__) && !defined(FA_DOUBLE)
        if (dtype == FA_F16)
            for (; i + 16 <= n; i += 16)
                _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(h + i))));
        if (dtype == FA_BF16)
            for (; i + 16 <= n; i += 16) {
                __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(h + i)));
                _mm512_storeu_si512(dst + i, _mm512_slli_epi32(x, 16));
            }
#elif defined(__F16C__) && !defined(FA_DOUBLE)
        if (dtype == FA_F16)
            for (; i + 8 <= n; i += 8)
                _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(h + i))));
#endif
        if (dtype == FA_BF16)
            for (; i < n; i++) {
                uint16_t b;
                memcpy(&b, h + i, 2);
                dst[i] = (real)from_bf16(b);
            }
    }
    for (; i < n; i++) dst[i] = load_one(src + i * stride, dtype);
}

// V_LANES elements side by side.
INLINE vr load_vector(const char *src, const int dtype) {
    if (dtype == NATIVE) return v_loadu((const real *)src);
#if defined(__AVX512F__) && !defined(FA_DOUBLE)
    if (dtype == FA_BF16)
        return (vr)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)src)), 16);
    if (dtype == FA_F16) return (vr)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)src));
#elif defined(__F16C__) && !defined(FA_DOUBLE)
    if (dtype == FA_F16) return (vr)_mm256_cvtph_ps(_mm_loadu_si128((const void *)src));
#endif
    real part[V_LANES] __attribute__((aligned(V_BYTES)));
    load_row(part, src, dtype_bytes(dtype), V_LANES, dtype);
    return v_load(part);
}

INLINE void store_one(char *p, int dtype, real x) {
    uint16_t h;
    float f = (float)x;
    double d = (double)x;
    switch (dtype) {
    case FA_F16: h = to_f16(odd_f32(d)); memcpy(p, &h, 2); break;
    case FA_BF16: h = to_bf16(odd_f32(d)); memcpy(p, &h, 2); break;
    case FA_F32: memcpy(p, &f, 4); break;
    default: memcpy(p, &d, 8);
    }
}
