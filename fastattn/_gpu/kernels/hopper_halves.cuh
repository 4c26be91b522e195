// float32 on Hopper: a number is two of float16, hi + lo, 22 bits together, and a product is lo hi,
// hi lo and hi hi, the small ones first; lo lo is dropped.
//
// The range of float16 is small, so a row is multiplied by a power of two that takes its largest
// number to [2^14, 2^15); its weight undoes that. A number loses at most 2^-23 of itself or 2^-40
// of its row's largest. One weight a row: that of a tile, a head or an array would let keys that
// are excluded, or other batch entries, change the bits of a result.
//
// Weights of q and k are multiplied into the scores. Those of v have to go into P, before the sum
// over keys: so rows of v whose largest number is of ordinary size share a factor, kOrdinary, and
// have the weight 1. P is in [0, 2^14], and results are in units of kUnit until they are written.
//
// A tile holds hi where the copy engine has put columns 0 .. 31 of a panel, and lo in place of
// columns 32 .. 63: it is split where it lies.

constexpr float kOrdinary = 64, kLowest = 0x1p-6f, kHighest = 0x1p9f;
constexpr float kUnit = 0x1p-14f / kOrdinary;
constexpr int kLowQ = kBr * 128, kLowK = kBc * 128, kLowV = kLowK;  // bytes from hi to lo

// Powers of two by their exponents with the bias of 127. The one that takes a number to
// [2^14, 2^15), or as near as there is one, and what undoes it.
DEVICE int exponent_of(float x) { return __float_as_int(x) >> 23; }
DEVICE float power(int exponent) { return __int_as_float(exponent << 23); }
DEVICE int exponent_to_halves(float x) { return min_of(268 - exponent_of(x), 252); }

// Eight lanes share a row, each a chunk of it in every panel, and a warp takes eight rows, two a
// lane. Rows r and r ^ 5 are in different banks both where floats are read and where halves are
// written.
DEVICE int row_of_lane(int lane, int eight, int which) {
  return eight * 8 + (which * 2 + (lane >> 4) ^ (lane >> 2 & 1) * 5);
}
DEVICE int chunk_of_lane(int lane) { return (lane & 3) + (lane >> 3 & 1) * 4; }

// What a lane knows of the sizes of a row's numbers.
struct Sizes {
  float top = 0;
  int exponents = 0;  // of numbers that are not 0: their sum, and how many there are << 16

  DEVICE void add(float x) {
    const int exponent = exponent_of(abs_of(x));
    top = max_of(top, abs_of(x));
    if (exponent) exponents += exponent + (1 << 16);
  }
  DEVICE void join(int step) {
    top = max_of(top, __shfl_xor_sync(~0u, top, step));
    exponents += __shfl_xor_sync(~0u, exponents, step);
  }
  // The mean of log2(top / |x|) over these, about.
  DEVICE float spread() const {
    const int count = exponents >> 16;
    const float mean = (float)(exponents & 0xffff) / (float)max_of(count, 1);
    return count ? (float)exponent_of(top) - mean : 0;
  }
};

// A lane's shares of its two rows become halves in a tile, and rows' weights. In the backward every
// row has a power of two of its own, and spreads follow the weights.
enum Whose { kOfQ, kOfK, kOfV, kOfRows };

template <Whose kWhose, int kRows, int kPanels>
DEVICE void write_halves(char* tile, float* weights, int lane, int eight,
                         const float (&x)[2][kPanels][8]) {
  float top[2] = {};
  Sizes sizes[2];
#pragma unroll
  for (int n = 0; n < kPanels; n++)
#pragma unroll
    for (int e = 0; e < 8; e++)
#pragma unroll
      for (int which = 0; which < 2; which++) {
        if (kWhose == kOfRows) sizes[which].add(x[which][n][e]);
        else top[which] = max_of(top[which], abs_of(x[which][n][e]));
      }
#pragma unroll
  for (int step = 1; step < 16; step = step == 2 ? 8 : 2 * step)
#pragma unroll
    for (int which = 0; which < 2; which++) {
      if (kWhose == kOfRows) sizes[which].join(step);
      else top[which] = max_of(top[which], __shfl_xor_sync(~0u, top[which], step));
    }
  const int c = chunk_of_lane(lane);
#pragma unroll
  for (int which = 0; which < 2; which++) {
    if (kWhose == kOfRows) top[which] = sizes[which].top;
    const int up = exponent_to_halves(top[which]), r = row_of_lane(lane, eight, which);
    float factor = power(up), weight = power(254 - up);
    // Too large a weight for a score to be a float32 number before it is multiplied by that of q.
    if (kWhose == kOfK && weight > 0x1p88f) weight = infinity(float());
    if (kWhose == kOfV) {
      const bool ordinary = top[which] == 0 || (top[which] >= kLowest && top[which] < kHighest);
      weight = ordinary ? 1 : weight * kOrdinary;
      factor = ordinary ? kOrdinary : factor;
    }
#pragma unroll
    for (int n = 0; n < kPanels; n++) {
      const float(&from)[8] = x[which][n];
      uint4 hi, lo;
      split(hi.x, lo.x, from[0] * factor, from[1] * factor);
      split(hi.y, lo.y, from[2] * factor, from[3] * factor);
      split(hi.z, lo.z, from[4] * factor, from[5] * factor);
      split(hi.w, lo.w, from[6] * factor, from[7] * factor);
      char* const to = tile + chunk_at<kRows>(0, r, n * 8 + c);
      *(uint4*)to = hi;
      *(uint4*)(to + kRows * 128) = lo;
    }
    if (c == 0) weights[r] = weight;
    if (kWhose == kOfRows && c == 0) weights[kRows + r] = sizes[which].spread();
  }
}

// A tile as the copy engine has left it, by `warps` of which this is the `warp`-th.
template <Whose kWhose, int kRows, int kColumns>
DEVICE void split_tile(char* tile, float* weights, int warp, int warps) {
  constexpr int kPanels = panels_of(kColumns);
#pragma unroll 1
  for (int eight = warp; eight < kRows / 8; eight += warps) {
    const int lane = threadIdx.x & 31, c = chunk_of_lane(lane);
    float x[2][kPanels][8];
#pragma unroll
    for (int which = 0; which < 2; which++)
#pragma unroll
      for (int n = 0; n < kPanels; n++) {
        const int r = row_of_lane(lane, eight, which);
        const char* const box = tile + ((2 * n + (c >> 2)) * kRows + r) * 128;
        union { float4 raw[2]; float each[8]; } from;
        from.raw[0] = *(const float4*)(box + ((2 * (c & 3) ^ r & 7) << 4));
        from.raw[1] = *(const float4*)(box + ((2 * (c & 3) + 1 ^ r & 7) << 4));
#pragma unroll
        for (int e = 0; e < 8; e++) x[which][n][e] = from.each[e];
      }
    __syncwarp();  // all have read what is overwritten now
    write_halves<kWhose, kRows>(tile, weights, lane, eight, x);
  }
}

// A tile by ordinary loads, by all threads: as load_tile_carefully.
template <Whose kWhose, int kRows, int kColumns>
DEVICE void load_halves_carefully(char* tile, float* weights, const Array& array, const char* row,
                                  int rows, int width, int mode) {
  constexpr int kPanels = panels_of(kColumns);
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int eight = threadIdx.x >> 5; eight < kRows / 8; eight += kWarps) {
    float x[2][kPanels][8];
#pragma unroll
    for (int n = 0; n < 4 * kPanels; n++) {
      const int which = n & 1, part = n >> 1 & 1, r = row_of_lane(lane, eight, which);
      const int c = (n >> 2) * kPanel + chunk_of_lane(lane) * 8 + part * 4;
      const char* const from = row + r * array.row + c * array.column;
      union { float4 all; float each[4]; } chunk;
      chunk.all = make_float4(0, 0, 0, 0);
      if (r < rows && c < width) {
        if (array.access == kVectors) {
          chunk.all = *(const float4*)from;
        } else {
#pragma unroll
          for (int e = 0; e < 4; e++)
            chunk.each[e] = load<float>(from + e * array.column, array.access);
        }
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (mode != kUsual) sanitize(chunk.each[e], mode);
        x[which][n >> 2][part * 4 + e] = chunk.each[e];
      }
    }
    write_halves<kWhose, kRows>(tile, weights, lane, eight, x);
  }
}

// Scores of halves become products of q and k. What float16 has lost of a row, 2^-40 of its
// largest, is less than 2^-25 of a score unless weights are large: such scores become NaN, for
// `repair` of blocks.cuh.
DEVICE void weigh_scores(float (&s)[kBc / 8][4], const float* weights_q, const float* weights_k,
                         float log2_unit) {
  const int t = threadIdx.x & 3;
  const float of_row[2] = {weights_q[0], weights_q[8]};
  constexpr float kLargest = 0x1p-15f * kLog2e / (kD == 64 ? 8 : 11.3137085);  // the root of kD
  float top = 0;
#pragma unroll
  for (int n = 0; n < kBc / 8; n++) {
    const float2 of_key = *(const float2*)(weights_k + n * 8 + 2 * t);
    top = max_of(top, max_of(of_key.x, of_key.y));
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = s[n][e] * (e & 1 ? of_key.y : of_key.x) * of_row[e >> 1];
  }
  if (__all_sync(~0u, max_of(of_row[0], of_row[1]) * top * log2_unit <= kLargest)) return;
#pragma unroll
  for (int n = 0; n < kBc / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (!(of_row[e >> 1] * weights_k[n * 8 + 2 * t + (e & 1)] * log2_unit <= kLargest))
        s[n][e] = infinity(float()) - infinity(float());
}

// Powers of two that a row of P is multiplied by on its way to halves, and its results thereafter.
struct Scaling { float up[2], down[2]; };

// Where rows of v have weights, these go into P, and P is scaled for halves: for each row of P by
// the pairs that are left to it.
DEVICE Scaling weigh_values(float (&p)[kBc / 8][4], const float* weights_v) {
  Scaling scaling = {{0x1p14f, 0x1p14f}, {1, 1}};
  bool ordinary = true;
#pragma unroll
  for (int j = threadIdx.x & 31; j < kBc; j += 32) ordinary = ordinary && weights_v[j] == 1;
  if (__all_sync(~0u, ordinary)) return scaling;
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float most = 0, least = infinity(float()), top = 0;
#pragma unroll
    for (int n = 0; n < kBc / 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (p[n][2 * half + i] == 0) continue;
        most = max_of(most, weights_v[n * 8 + 2 * t + i]);
        least = min_of(least, weights_v[n * 8 + 2 * t + i]);
      }
    most = quad_max(most);
    least = -quad_max(-least);
    const bool apart = most != 0 && (most != 1 || least != 1);
    const float inverse = power(254 - exponent_of(apart ? most : 1));
#pragma unroll
    for (int n = 0; n < kBc / 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float& x = p[n][2 * half + i];
        if (apart && x != 0) x *= weights_v[n * 8 + 2 * t + i] * inverse;
        top = max_of(top, x);
      }
    const int up = min_of(exponent_to_halves(quad_max(top)), 247);
    if (apart) {
      scaling.up[half] = power(up);
      scaling.down[half] = power(254 - up) * 0x1p14f * most;
    }
  }
  return scaling;
}

// P as two factors of the next product, hi and lo.
template <int N, int K, int M>
DEVICE void to_factor(u32 (&p)[N][K][4], const float (&c)[M][4], const float (&up)[2]) {
  static_assert(M == 2 * K, "");
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int x = 0; x < 4; x++) {
      const int half = x & 1;
      const float(&from)[4] = c[2 * k + (x >> 1)];
      split(p[0][k][x], p[N - 1][k][x], from[2 * half] * up[half], from[2 * half + 1] * up[half]);
    }
}
