// Number types, and the few scalar operations that kernels need of them. No header is included, so
// that NVRTC needs no include path.
//
// Three types are chosen by the configuration: Elem is what the arrays hold, Tile what shared
// memory holds and matrix instructions take (Elem, but for bfloat16 on chips without its
// instructions), Acc what is summed in.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__

struct f16 { u16 bits; };
struct bf16 { u16 bits; };
struct halves { float x; };  // float32 on its way to two float16 numbers; see mma.cuh

constexpr double kLog2e = 1.4426950408889634;

DEVICE float infinity(float) { return __int_as_float(0x7f800000); }
DEVICE double infinity(double) { return __longlong_as_double(0x7ff0000000000000ll); }

// ---------------------------------------------------------------- conversions

DEVICE float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DEVICE float widen(bf16 x) { return __int_as_float((u32)x.bits << 16); }
DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }

DEVICE void narrow(f16& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE void narrow(bf16& y, float x) {
#if kArch >= 80
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const u32 bits = __float_as_int(x);
  y.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
}
DEVICE void narrow(float& y, float x) { y = x; }
DEVICE void narrow(halves& y, float x) { y.x = x; }
DEVICE void narrow(float& y, double x) { y = (float)x; }
DEVICE void narrow(double& y, double x) { y = x; }
DEVICE void narrow(f16& y, double x) { narrow(y, (float)x); }
DEVICE void narrow(bf16& y, double x) { narrow(y, (float)x); }

template <class To, class From>
DEVICE To convert(From x) {
  To y;
  narrow(y, widen(x));
  return y;
}

// Two 16-bit numbers in a register, the first in the lower half.
DEVICE u32 pack(f16, float low, float high) {
  u32 y;
#if kArch >= 80
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  f16 a, b;
  narrow(a, low);
  narrow(b, high);
  asm("mov.b32 %0, {%1, %2};" : "=r"(y) : "h"(a.bits), "h"(b.bits));
#endif
  return y;
}
DEVICE u32 pack(bf16, float low, float high) {
#if kArch >= 80
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  bf16 a, b;
  narrow(a, low);
  narrow(b, high);
  return a.bits | (u32)b.bits << 16;
#endif
}

// ---------------------------------------------------------------- arithmetic

DEVICE bool finite(f16 x) { return (x.bits & 0x7c00) != 0x7c00; }
DEVICE bool finite(bf16 x) { return (x.bits & 0x7f80) != 0x7f80; }
DEVICE bool finite(float x) { return (__float_as_int(x) & 0x7f800000) != 0x7f800000; }
DEVICE bool finite(double x) {
  return (__double_as_longlong(x) & 0x7ff0000000000000ll) != 0x7ff0000000000000ll;
}

DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE double exp2_of(double x) { return exp2(x); }
DEVICE float exp_of(float x) { return exp2_of(x * (float)kLog2e); }
DEVICE double exp_of(double x) { return exp(x); }
DEVICE float log_of(float x) { return logf(x); }
DEVICE double log_of(double x) { return log(x); }
// tanh(x) = x + x tanh_rest(x) up to |x| = 0.6; fitted.
DEVICE float tanh_rest(float x) {
  const float y = x * x;
  float p = fmaf(-5.8951991e-3f, y, 2.0796010e-2f);
  p = fmaf(p, y, -5.3783843e-2f);
  p = fmaf(p, y, 1.3331924e-1f);
  return fmaf(p, y, -3.3333298e-1f) * y;
}
// x P(x^2) / Q(x^2), fitted to 2e-8 up to 9.02, where tanh rounds to 1.
DEVICE float tanh_of(float x) {
  const float y = x * x;
  float p = fmaf(1.3318892e-8f, y, 2.0583435e-5f), q = fmaf(7.7619703e-7f, y, 3.2830916e-4f), r;
  p = fmaf(p, y, 3.4940354e-3f);
  q = fmaf(q, y, 2.5871080e-2f);
  p = fmaf(p, y, 1.3379720e-1f);
  q = fmaf(q, y, 4.6713035e-1f);
  p = fmaf(p, y, 0.99999998f);
  q = fmaf(q, y, 1);
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(q));
  return fabsf(x) > 9.02f ? copysignf(1, x) : x * p * r;
}
DEVICE double tanh_of(double x) { return tanh(x); }
DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
DEVICE double max_of(double a, double b) { return fmax(a, b); }
DEVICE float min_of(float a, float b) { return fminf(a, b); }
DEVICE float abs_of(float x) { return fabsf(x); }
DEVICE double abs_of(double x) { return fabs(x); }
DEVICE float fma_of(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE double fma_of(double a, double b, double c) { return __fma_rn(a, b, c); }
DEVICE int min_of(int a, int b) { return a < b ? a : b; }
DEVICE int max_of(int a, int b) { return a > b ? a : b; }
DEVICE i64 min_of(i64 a, i64 b) { return a < b ? a : b; }
DEVICE i64 max_of(i64 a, i64 b) { return a > b ? a : b; }

// The same number, of which the compiler knows nothing: what is computed from it stays where it is
// needed, instead of in registers that a loop lacks.
DEVICE int hidden(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The four lanes that hold a row's columns agree on its maximum, or its sum.
template <class T>
DEVICE T quad_max(T x) {
  x = max_of(x, __shfl_xor_sync(~0u, x, 1));
  return max_of(x, __shfl_xor_sync(~0u, x, 2));
}
template <class T>
DEVICE T quad_sum(T x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
// All lanes of a warp agree.
template <class T>
DEVICE T warp_max(T x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = max_of(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
template <class T>
DEVICE T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
