// The matrix product of a warp: m16n8 blocks of accumulators, whatever the type.
//
// An accumulator block is Acc[4]. With g = lane / 4 and t = lane % 4, a lane holds
//     [0] (row g, column 2t)   [1] (row g, column 2t + 1)   [2], [3] the same of row g + 8
// A step of the sum is 32 bytes of a row for the types of up to 32 bits (16 or 8 numbers), and
// 8 numbers of float64.
//
// Sums of which one factor is an accumulator block of an earlier product (P V, dS K, ...) go over
// that block's columns, 2t and 2t + 1 in a lane. 16-bit instructions take them as they lie; the
// float32 and float64 ones would want t and t + 4, so there the sum is taken in another order:
// slot t stands for column 2t, slot t + 4 for 2t + 1, in both factors.
//
// float32 in tf32: each factor is split in two tf32 numbers, hi + lo, 22 bits together; lo * lo is
// dropped. The tensor cores truncate as they add, so small products come ahead of large ones or
// have a sum of their own, few steps share an accumulator, and a sum that goes on over tiles is
// added up outside of them.
//
// float32 in halves, at twice the rate: likewise two float16 numbers, hi + lo. Their range is
// small, so a row is multiplied by a power of two that takes its largest to [2^14, 2^15); see
// halves.cuh. What an element loses is at most 2^-23 of itself or 2^-40 of its row's largest. A
// tile in shared memory keeps its size: for 8 columns there are 16 bytes of hi, then 16 of lo.

constexpr int kStep = sizeof(Tile) == 2 || kInHalves ? 16 : 8;

#if kArch >= 80
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], f16) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], float) {
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void multiply_add(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
#pragma unroll
  for (int s = 0; s < 2; s++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
                   : "+d"(c[2 * half]), "+d"(c[2 * half + 1])
                   : "d"(a[2 * s + half]), "d"(b[s]));
}
#else
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], f16) {
#pragma unroll
  for (int s = 0; s < 2; s++)
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * s]), "r"(a[2 * s + 1]), "r"(b[s]));
}
// No instruction for these on Turing: lanes hand one another the numbers of the same layout.
// Called, not inlined, as its code is long and it is everywhere.
template <class T>
struct Block { T x[4]; };

template <class T>
__device__ __noinline__ Block<T> multiply_add_by_lanes(Block<T> c, Block<T> a, T b0, T b1) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int s = 0; s < 2; s++)
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const T upper = __shfl_sync(~0u, a.x[2 * s], g * 4 + k);
      const T lower = __shfl_sync(~0u, a.x[2 * s + 1], g * 4 + k);
      const T left = __shfl_sync(~0u, s ? b1 : b0, 2 * t * 4 + k);
      const T right = __shfl_sync(~0u, s ? b1 : b0, (2 * t + 1) * 4 + k);
      c.x[0] = fma_of(upper, left, c.x[0]);
      c.x[1] = fma_of(upper, right, c.x[1]);
      c.x[2] = fma_of(lower, left, c.x[2]);
      c.x[3] = fma_of(lower, right, c.x[3]);
    }
  return c;
}
template <class T>
DEVICE void multiply_add(T (&c)[4], const T (&a)[4], const T (&b)[2]) {
  const Block<T> sum =
      multiply_add_by_lanes<T>({{c[0], c[1], c[2], c[3]}}, {{a[0], a[1], a[2], a[3]}}, b[0], b[1]);
#pragma unroll
  for (int e = 0; e < 4; e++) c[e] = sum.x[e];
}
#endif

// ---------------------------------------------------------------- factors, a step of the sum each

// A: 16 rows. B: 8 columns. Both in the register layout of the instruction.
template <class T> struct FactorA { u32 x[4]; };
template <class T> struct FactorB { u32 x[2]; };
template <> struct FactorA<double> { double x[4]; };
template <> struct FactorB<double> { double x[2]; };
#if kArch >= 80
template <> struct FactorA<float> { u32 hi[4], lo[4]; };
template <> struct FactorB<float> { u32 hi[2], lo[2]; };
template <> struct FactorA<halves> { u32 hi[4], lo[4]; };
template <> struct FactorB<halves> { u32 hi[2], lo[2]; };
// Two numbers at once, the first in the lower half.
DEVICE void split(u32& hi, u32& lo, float x, float y) {
  float a, b;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(hi) : "f"(y), "f"(x));
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(a), "=f"(b) : "r"(hi));
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(lo) : "f"(y - b), "f"(x - a));
}
// hi is x rounded to the 11 bits of a tf32 number; the instruction takes as much of lo. NaN stays
// in one of the two.
DEVICE void split(u32& hi, u32& lo, float x) {
  hi = (u32)__float_as_int(x) + 0x1000 & 0xffffe000;
  lo = __float_as_int(x - __int_as_float(hi));
}
#else
template <> struct FactorA<float> { float x[4]; };
template <> struct FactorB<float> { float x[2]; };
#endif

template <class T, int N>
DEVICE void set(T (&to)[N], const T (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = from[i];
}

DEVICE void ldmatrix(u32 (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"((u32)__cvta_generic_to_shared(row)));
}
DEVICE void ldmatrix_transposed(u32 (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"((u32)__cvta_generic_to_shared(row)));
}

template <class T>
DEVICE void take(FactorA<T>& f, const u32 (&x)[4]) { set(f.x, x); }
template <class T>
DEVICE void take(FactorB<T>& f, u32 x0, u32 x1) { f.x[0] = x0; f.x[1] = x1; }
#if kArch >= 80
DEVICE void take(FactorA<float>& f, const u32 (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) split(f.hi[i], f.lo[i], __int_as_float(x[i]));
}
DEVICE void take(FactorB<float>& f, u32 x0, u32 x1) {
  split(f.hi[0], f.lo[0], __int_as_float(x0));
  split(f.hi[1], f.lo[1], __int_as_float(x1));
}
#else
DEVICE void take(FactorA<float>& f, const u32 (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) f.x[i] = __int_as_float(x[i]);
}
DEVICE void take(FactorB<float>& f, u32 x0, u32 x1) {
  f.x[0] = __int_as_float(x0);
  f.x[1] = __int_as_float(x1);
}
#endif

// 16 rows of a tile, whose rows go along the sum: `at` is row 0 at the step's first number.
template <class T>
DEVICE void load_a(FactorA<T>& f, const T* at, int pitch) {
  const int lane = threadIdx.x & 31;
  u32 x[4];
  ldmatrix(x, (const char*)(at + (lane & 15) * pitch) + (lane >> 4) * 16);
  take(f, x);
}
DEVICE void load_a(FactorA<double>& f, const double* at, int pitch) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int s = 0; s < 2; s++)
#pragma unroll
    for (int half = 0; half < 2; half++) f.x[2 * s + half] = at[(g + 8 * half) * pitch + t + 4 * s];
}

#if kArch >= 80
DEVICE void load_a(FactorA<halves>& f, const halves* at, int pitch) {
  const int lane = threadIdx.x & 31;
  const char* const row = (const char*)(at + (lane & 15) * pitch) + (lane >> 4) * 32;
  ldmatrix(f.hi, row);
  ldmatrix(f.lo, row + 16);
}
#endif

// 16 rows of a tile, whose rows go along the sum, as the columns of two factors.
template <class T>
DEVICE void load_b(FactorB<T> (&f)[2], const T* at, int pitch) {
  const int lane = threadIdx.x & 31;
  u32 x[4];
  ldmatrix(x, (const char*)(at + ((lane & 7) + (lane >> 4) * 8) * pitch) + (lane >> 3 & 1) * 16);
  take(f[0], x[0], x[1]);
  take(f[1], x[2], x[3]);
}
DEVICE void load_b(FactorB<double> (&f)[2], const double* at, int pitch) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int s = 0; s < 2; s++) f[n].x[s] = at[(g + 8 * n) * pitch + t + 4 * s];
}

#if kArch >= 80
DEVICE void take(FactorB<halves> (&f)[2], const u32 (&hi)[4], const u32 (&lo)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    f[i >> 1].hi[i & 1] = hi[i];
    f[i >> 1].lo[i & 1] = lo[i];
  }
}
DEVICE void load_b(FactorB<halves> (&f)[2], const halves* at, int pitch) {
  const int lane = threadIdx.x & 31;
  const halves* const of_lane = at + ((lane & 7) + (lane >> 4) * 8) * pitch;
  const char* const row = (const char*)of_lane + (lane >> 3 & 1) * 32;
  u32 hi[4], lo[4];
  ldmatrix(hi, row);
  ldmatrix(lo, row + 16);
  take(f, hi, lo);
}
#endif

// kStep rows of a tile, which are summed over, and 16 of its columns as two factors.
template <class T>
DEVICE void load_b_of_rows(FactorB<T> (&f)[2], const T* at, int pitch) {
  const int lane = threadIdx.x & 31;
  u32 x[4];
  ldmatrix_transposed(x, at + (lane & 15) * pitch + (lane >> 4) * 8);
  take(f[0], x[0], x[1]);
  take(f[1], x[2], x[3]);
}
DEVICE void load_b_of_rows(FactorB<float> (&f)[2], const float* at, int pitch) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < 2; n++)
    take(f[n], __float_as_int(at[2 * t * pitch + g + 8 * n]),
         __float_as_int(at[(2 * t + 1) * pitch + g + 8 * n]));
}
DEVICE void load_b_of_rows(FactorB<double> (&f)[2], const double* at, int pitch) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int s = 0; s < 2; s++) f[n].x[s] = at[(2 * t + s) * pitch + g + 8 * n];
}

#if kArch >= 80
DEVICE void load_b_of_rows(FactorB<halves> (&f)[2], const halves* at, int pitch) {
  const int lane = threadIdx.x & 31;
  const char* const row = (const char*)(at + (lane & 15) * pitch) + (lane >> 4) * 32;
  u32 hi[4], lo[4];
  ldmatrix_transposed(hi, row);
  ldmatrix_transposed(lo, row + 16);
  take(f, hi, lo);
}
#endif

// Accumulator blocks as the rows of a factor: kStep / 8 blocks side by side are a step of the sum.
template <class T>
DEVICE void from_blocks(FactorA<T>& f, const float (&left)[4], const float (&right)[4]) {
  f.x[0] = pack(T(), left[0], left[1]);
  f.x[1] = pack(T(), left[2], left[3]);
  f.x[2] = pack(T(), right[0], right[1]);
  f.x[3] = pack(T(), right[2], right[3]);
}
DEVICE void from_blocks(FactorA<float>& f, const float (&c)[4], const float (&)[4]) {
  const u32 x[4] = {(u32)__float_as_int(c[0]), (u32)__float_as_int(c[2]),
                    (u32)__float_as_int(c[1]), (u32)__float_as_int(c[3])};
  take(f, x);
}
#if kArch >= 80
DEVICE void from_blocks(FactorA<halves>& f, const float (&left)[4], const float (&right)[4]) {
  split(f.hi[0], f.lo[0], left[0], left[1]);
  split(f.hi[1], f.lo[1], left[2], left[3]);
  split(f.hi[2], f.lo[2], right[0], right[1]);
  split(f.hi[3], f.lo[3], right[2], right[3]);
}
#endif
DEVICE void from_blocks(FactorA<double>& f, const double (&c)[4], const double (&)[4]) {
  f.x[0] = c[0];
  f.x[1] = c[2];
  f.x[2] = c[1];
  f.x[3] = c[3];
}

// ---------------------------------------------------------------- sums over steps

// A sum of products, [M][N] blocks; two accumulators for float32, where `small` holds what the
// dropped halves give.
template <class T>
DEVICE void multiply_add(Acc (&c)[4], Acc (&)[4], const FactorA<T>& a, const FactorB<T>& b) {
  if constexpr (sizeof(T) == 2) multiply_add(c, a.x, b.x, T());
  else multiply_add(c, a.x, b.x);
}
#if kArch >= 80
// What the parts of a number are to the instruction.
DEVICE float part_of(float) { return 0; }
DEVICE f16 part_of(halves) { return {}; }

template <class T>
DEVICE void multiply_add_small(float (&c)[4], const FactorA<T>& a, const FactorB<T>& b) {
  multiply_add(c, a.lo, b.hi, part_of(T()));
  multiply_add(c, a.hi, b.lo, part_of(T()));
}
template <class T>
DEVICE void multiply_add_large(float (&c)[4], const FactorA<T>& a, const FactorB<T>& b) {
  multiply_add(c, a.hi, b.hi, part_of(T()));
}
DEVICE void multiply_add(float (&c)[4], float (&small)[4], const FactorA<float>& a,
                         const FactorB<float>& b) {
  multiply_add_small(small, a, b);
  multiply_add_large(c, a, b);
}
DEVICE void multiply_add(float (&c)[4], float (&small)[4], const FactorA<halves>& a,
                         const FactorB<halves>& b) {
  multiply_add_small(small, a, b);
  multiply_add_large(c, a, b);
}
constexpr bool kSplit = sizeof(Tile) == 4;  // products come in two parts
#else
constexpr bool kSplit = false;
#endif

template <int M, int N>
DEVICE void clear(Acc (&c)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0;
}

// c += rows of a x rows of b: both tiles go along the sum. `a` is the warp's first row. The sum
// leaves its accumulator every kChain steps, small products having come first, and joins c every
// kEvery, which keeps long sums accurate: tensor cores truncate. kEvery = 0 is never.
constexpr int kParts = sizeof(Tile) == 2 ? 0 : kSplit ? 8 : 4;

template <int kSteps, int kEvery = kParts, int M, int N>
DEVICE void multiply_rows(Acc (&c)[M][N][4], const Tile* a, int pitch_a, const Tile* b,
                          int pitch_b) {
  constexpr bool kApart = kEvery != 0 && kEvery < kSteps || kSplit;
  constexpr int kChain = kSplit ? 2 : 1;
  static_assert(kSteps % kChain == 0 && kEvery % kChain == 0);
  Acc part[kApart ? M : 1][kApart ? N : 1][4];
#pragma unroll
  for (int k = 0; k < kSteps; k += kChain) {
    if (kApart && !kSplit && k % kEvery == 0) clear(part);
    FactorA<Tile> fa[kChain][M];
#pragma unroll
    for (int x = 0; x < kChain; x++)
#pragma unroll
      for (int m = 0; m < M; m++)
        load_a(fa[x][m], a + m * 16 * pitch_a + (k + x) * kStep, pitch_a);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      FactorB<Tile> fb[kChain][2];
#pragma unroll
      for (int x = 0; x < kChain; x++)
        load_b(fb[x], b + n * 8 * pitch_b + (k + x) * kStep, pitch_b);
      if constexpr (kSplit) {
        Acc sum[M][2][4];
        clear(sum);
#pragma unroll
        for (int x = 0; x < 2 * kChain; x++)
#pragma unroll
          for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              if (x < kChain) multiply_add_small(sum[m][i], fa[x][m], fb[x][i]);
              else multiply_add_large(sum[m][i], fa[x - kChain][m], fb[x - kChain][i]);
            }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
              part[m][n + i][e] = k % kEvery ? part[m][n + i][e] + sum[m][i][e] : sum[m][i][e];
      } else {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            if constexpr (kApart)
              multiply_add(part[m][n + i], part[m][n + i], fa[0][m], fb[0][i]);
            else multiply_add(c[m][n + i], c[m][n + i], fa[0][m], fb[0][i]);
          }
      }
    }
    if constexpr (kApart) {
      const int end = k + kChain;
      if (end % kEvery == 0 || end == kSteps)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[m][n][e] += part[m][n][e];
    }
  }
}

// The products of `a` in two: those with its numbers cut to few bits, in whose sum truncation finds
// next to nothing to take, and the rest.
DEVICE float cut(float x) { return __int_as_float(__float_as_int(x) & 0xfff80000); }
DEVICE f16 cut(f16 x) { return {(u16)(finite(x) ? x.bits & 0xffc0 : x.bits)}; }
DEVICE bf16 cut(bf16 x) { return {(u16)(finite(x) ? x.bits & 0xfff0 : x.bits)}; }

template <class T>
DEVICE void multiply_add_apart(Acc (&few)[4], Acc (&rest)[4], const FactorA<T>& a,
                               const FactorB<T>& b) {
  u32 of_few[4], of_rest[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const T low = {(u16)a.x[i]}, high = {(u16)(a.x[i] >> 16)};
    of_few[i] = cut(low).bits | (u32)cut(high).bits << 16;
    of_rest[i] = pack(T(), finite(low) ? widen(low) - widen(cut(low)) : 0,
                      finite(high) ? widen(high) - widen(cut(high)) : 0);
  }
  multiply_add(few, of_few, b.x, T());
  multiply_add(rest, of_rest, b.x, T());
}

#if kArch >= 80
// What the instruction drops of the lower parts is felt too, where it is that of few keys.
DEVICE u32 dropped(u32 lo) {
  return __float_as_int(__int_as_float(lo) - __int_as_float(lo & 0xffffe000));
}

DEVICE void multiply_add_apart(float (&few)[4], float (&rest)[4], const FactorA<float>& a,
                               const FactorB<float>& b) {
  u32 of_few[4], of_rest[4], a_dropped[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float hi = __int_as_float(a.hi[i]);
    of_few[i] = __float_as_int(cut(hi));
    of_rest[i] = __float_as_int(hi - cut(hi));
    a_dropped[i] = dropped(a.lo[i]);
  }
  const u32 b_dropped[2] = {dropped(b.lo[0]), dropped(b.lo[1])};
  multiply_add(rest, a.lo, b.lo, float());
  multiply_add(rest, a_dropped, b.hi, float());
  multiply_add(rest, a.hi, b_dropped, float());
  multiply_add(rest, a.lo, b.hi, float());
  multiply_add(rest, a.hi, b.lo, float());
  multiply_add(rest, of_rest, b.hi, float());
  multiply_add(few, of_few, b.hi, float());
}
#endif

// As multiply_rows, but rounded to the nearest, for sums in which an error that always has the sign
// of its product would add up.
constexpr bool kTruncates = sizeof(Tile) == 2 || kSplit;

template <int kSteps, int M, int N>
DEVICE void multiply_rows_rounded(Acc (&c)[M][N][4], const Tile* a, int pitch_a, const Tile* b,
                                  int pitch_b) {
  if constexpr (!kTruncates) {
    multiply_rows<kSteps>(c, a, pitch_a, b, pitch_b);
  } else {
#pragma unroll 1
    for (int k = 0; k < kSteps; k++) {
      FactorA<Tile> fa[M];
#pragma unroll
      for (int m = 0; m < M; m++) load_a(fa[m], a + m * 16 * pitch_a + k * kStep, pitch_a);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        FactorB<Tile> fb[2];
        load_b(fb, b + n * 8 * pitch_b + k * kStep, pitch_b);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            Acc few[4] = {}, rest[4] = {};
            multiply_add_apart(few, rest, fa[m], fb[i]);
#pragma unroll
            for (int e = 0; e < 4; e++) c[m][n + i][e] += few[e] + rest[e];
          }
      }
    }
  }
}

// c = c x scale of its row + p x tile, for p in accumulator blocks, whose columns are the tile's
// rows. scale[m][0] is that of row g, scale[m][1] that of row g + 8. In halves p is multiplied by
// `up` of its row first, and the product by `down`.
struct NoWeights {};
template <int M> struct Weights { float up[M][2], down[M][2]; };

template <bool kRescale, int M, int K, int N, class W = NoWeights>
DEVICE void multiply_blocks(Acc (&c)[M][N][4], const Acc (&p)[M][K][4], const Tile* tile, int pitch,
                            const Acc (&scale)[M][2], const W& weights = W()) {
  constexpr int kBlocks = kStep / 8, kSteps = K / kBlocks;
  FactorA<Tile> fa[M][kSteps];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
      if constexpr (kInHalves) {
        Acc x[2][4];
#pragma unroll
        for (int e = 0; e < 8; e++)
          x[e / 4][e % 4] = p[m][2 * k + e / 4][e % 4] * weights.up[m][e % 4 / 2];
        from_blocks(fa[m][k], x[0], x[1]);
      } else {
        from_blocks(fa[m][k], p[m][k * kBlocks], p[m][k * kBlocks + kBlocks - 1]);
      }
    }
  if constexpr (kSplit) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      Acc sum[M][2][4], small[M][2][4];
      clear(sum);
      clear(small);
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
        FactorB<Tile> fb[2];
        load_b_of_rows(fb, tile + k * kStep * pitch + n * 8, pitch);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 2; i++) multiply_add(sum[m][i], small[m][i], fa[m][k], fb[i]);
      }
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            Acc all = sum[m][i][e] + small[m][i][e];
            if constexpr (kInHalves) all *= weights.down[m][e >> 1];
            c[m][n + i][e] = fma_of(c[m][n + i][e], kRescale ? scale[m][e >> 1] : 1, all);
          }
    }
  } else {
    bool same = true;  // the usual case once a row's maximum has been met
    if constexpr (kRescale) {
#pragma unroll
      for (int m = 0; m < M; m++) same = same && scale[m][0] == 1 && scale[m][1] == 1;
    }
    if (kRescale && !__all_sync(~0u, same)) {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) c[m][n][e] *= scale[m][e >> 1];
    }
#pragma unroll
    for (int k = 0; k < kSteps; k++)
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        FactorB<Tile> fb[2];
        load_b_of_rows(fb, tile + k * kStep * pitch + n * 8, pitch);
#pragma unroll
        for (int m = 0; m < M; m++) {
          multiply_add(c[m][n], c[m][n], fa[m][k], fb[0]);
          multiply_add(c[m][n + 1], c[m][n + 1], fa[m][k], fb[1]);
        }
      }
  }
}

// ---------------------------------------------------------------- long sums

// Sums over many tiles have two levels, of float64 and, in the backward, of float32: c is the part
// of every so many rows of the tiles' array, which joins the sum of earlier parts. That one is met
// so seldom that it is kept in memory, by being volatile.
constexpr bool kTwoLevels = sizeof(Tile) == 8, kTwoLevelsBackward = sizeof(Acc) == sizeof(Tile);
constexpr int kRowsOfPart = 512;

template <int M, int N>
struct Earlier { volatile Acc x[M][N][4]; };

template <int M, int N>
DEVICE void clear(Earlier<M, N>& earlier) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) earlier.x[m][n][e] = 0;
}
// c += earlier parts x scale of their row.
template <bool kRescale, int M, int N>
DEVICE void add_earlier(Acc (&c)[M][N][4], const Earlier<M, N>& earlier,
                        const Acc (&scale)[M][2]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        c[m][n][e] = fma_of(earlier.x[m][n][e], kRescale ? scale[m][e >> 1] : 1, c[m][n][e]);
}
template <bool kRescale, int M, int N>
DEVICE void end_part(Earlier<M, N>& earlier, Acc (&c)[M][N][4], const Acc (&scale)[M][2]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        earlier.x[m][n][e] =
            fma_of(earlier.x[m][n][e], kRescale ? scale[m][e >> 1] : 1, c[m][n][e]);
  clear(c);
}

// A sum of single numbers in float64; that of float64 numbers remembers what was rounded off.
struct Total {
  double high = 0, low = 0;
  DEVICE void add(double x) {
    const double sum = high + x, added = sum - high;
    if (sizeof(Acc) == 8) low += (high - (sum - added)) + (x - added);
    high = sum;
  }
  DEVICE double sum() const { return high + low; }
};
