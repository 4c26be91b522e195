// float32 in halves (mma.cuh): powers of two that take rows into the range of float16, and what
// undoes them. One per row, so that no pair's result depends on another pair.

// A row's numbers are multiplied by a power of two and split, each thread what it has loaded,
// before others read it. weights[r] becomes what undoes the factor. With kOrdinaryApart the factor
// of rows of ordinary size is kOrdinary, and weights are in units of 1 / kOrdinary: theirs is 1.
enum Split { kEveryRow, kOrdinaryApart };
constexpr float kOrdinary = 64, kLowest = 0x1p-6f, kHighest = 0x1p9f;

template <Split kWhich, int kRows, int kColumns>
DEVICE void split_tile(Tile* tile, float* weights, int mode) {
  constexpr int kChunks = kColumns / 8;
  static_assert((kChunks & (kChunks - 1)) == 0 && kRows * kChunks % kThreads == 0, "");
#pragma unroll 1
  for (int y = 0; y < kRows * kChunks / kThreads; y++) {
    const int x = threadIdx.x + y * kThreads, r = x / kChunks, c = x % kChunks;
    uint4* const at = (uint4*)(tile + r * pitch_of(kColumns) + c * 8);
    union { uint4 raw[2]; float each[8]; } from;
    from.raw[0] = at[0];
    from.raw[1] = at[1];
    if (kWhich == kOrdinaryApart && mode != kUsual)
#pragma unroll
      for (int i = 0; i < 8; i++) sanitize(from.each[i], mode);
    float top = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) top = max_of(top, abs_of(from.each[i]));
#pragma unroll
    for (int i = 1; i < kChunks; i *= 2) top = max_of(top, __shfl_xor_sync(~0u, top, i));
    // Exponents with their bias of 127: 2^14 / 2^(that of top), and what undoes it.
    const int up = min_of(268 - (int)((u32)__float_as_int(top) >> 23), 252);
    float factor = __int_as_float(up << 23), weight = __int_as_float(254 - up << 23);
    if (kWhich == kOrdinaryApart) {
      const bool ordinary = top == 0 || (top >= kLowest && top < kHighest);
      weight = ordinary ? 1 : weight * kOrdinary;
      factor = ordinary ? kOrdinary : factor;
    }
    union { uint4 raw; u32 each[4]; } hi, lo;
#pragma unroll
    for (int i = 0; i < 4; i++)
      split(hi.each[i], lo.each[i], from.each[2 * i] * factor, from.each[2 * i + 1] * factor);
    at[0] = hi.raw;
    at[1] = lo.raw;
    if (c == 0) weights[r] = weight;
  }
}

// Scores of rows in halves. Where a product of weights is too large they become NaN, for `repair`.
template <int M, int N>
DEVICE void weigh(Acc (&s)[M][N][4], const float* weights_q, const float* weights_k,
                  float largest) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  float of_row[M][2], top = 0, top_q = 0;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      of_row[m][half] = weights_q[m * 16 + half * 8 + g];
      top_q = max_of(top_q, of_row[m][half]);
    }
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float2 of_key = *(const float2*)(weights_k + n * 8 + 2 * t);
    top = max_of(top, max_of(of_key.x, of_key.y));
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        s[m][n][e] = s[m][n][e] * (e & 1 ? of_key.y : of_key.x) * of_row[m][e >> 1];
  }
  if (top_q * top > largest) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (of_row[m][e >> 1] * weights_k[n * 8 + 2 * t + (e & 1)] > largest)
            s[m][n][e] = infinity(Acc()) - infinity(Acc());
  }
}

// P on its way to the product with values in halves: in [0, 2^15), whatever the values' weights, of
// which only those of pairs that are left matter to a row. Results are in units of kUnit.
constexpr float kUnit = 0x1p-14f / kOrdinary;

template <int M, int N>
DEVICE Weights<M> weigh_values(Acc (&p)[M][N][4], const float* weights_v) {
  const int t = threadIdx.x & 3;
  Weights<M> w;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      w.up[m][half] = 0x1p14f;
      w.down[m][half] = 1;
    }
  bool ordinary = true;
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float2 of_key = *(const float2*)(weights_v + n * 8 + 2 * t);
    ordinary = ordinary && of_key.x == 1 && of_key.y == 1;
  }
  if (__all_sync(~0u, ordinary)) return w;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float most = 0, least = infinity(float());  // weights of pairs that are left
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float weight = weights_v[n * 8 + 2 * t + i];
          if (p[m][n][2 * half + i] == 0) continue;
          most = max_of(most, weight);
          least = min_of(least, weight);
        }
      most = quad_max(most);
      least = -quad_max(-least);
      const bool apart = most != 0 && (most != 1 || least != 1);
      const float inverse = __int_as_float((254 << 23) - __float_as_int(apart ? most : 1));
      float top = 0;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& x = p[m][n][2 * half + i];
          if (apart && x != 0) x *= weights_v[n * 8 + 2 * t + i] * inverse;
          top = max_of(top, x);
        }
      top = quad_max(top);
      // As in split_tile, but that the largest may be too small for 2^14.
      const int up = min_of(268 - (__float_as_int(top) >> 23), 247);
      if (apart) {
        w.up[m][half] = __int_as_float(up << 23);
        w.down[m][half] = __int_as_float(254 - up << 23) * 0x1p14f * most;
      }
    }
  return w;
}
