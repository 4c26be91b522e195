// float32 backward on Hopper: what hopper_halves_q.cu and hopper_halves_kv.cu, which are fast, and
// hopper_careful_halves_q.cu and hopper_careful_halves_kv.cu share. Tiles are in halves as in
// hopper_halves.cuh, with a power of two for every row, since all four arrays are summed over.
// hopper_split.cu makes halves of all rows before the fast ones load them.
//
// Sums of more than 32 products in an accumulator would be felt, as lse is given and what the
// tensor cores truncate of S does not cancel. The second products are made 64 rows at a time and
// then added, to sums of two levels as in mma.cuh.

constexpr int kMostSteps = 2;
constexpr float kOnes[1][2] = {};  // no sum is rescaled

// A B^T over all columns of two tiles, in batches of 64 columns.
constexpr int kBatches = kD / 64;
static_assert(kD == kDv && kBatches <= 2, "");

template <int kRowsA, int kRowsB>
struct Product {
  static constexpr int kParts = 4 / kMostSteps;
  float c[kParts][kN][4];

  template <int kBatch>
  DEVICE void start(u64 a, u64 b) {
    products_fence();
    start_parts<kBatch, 0>(a, b);
    products_commit();
  }
  template <int kBatch, int kPart>
  DEVICE void start_parts(u64 a, u64 b) {
    constexpr int kFrom = (kBatch * kParts + kPart) * kMostSteps, kTo = kFrom + kMostSteps;
    multiply_along_rows<kFrom, kTo, kRowsA, kRowsB>(c[kPart], a + (kRowsA * 128 >> 4), b, 0);
    multiply_along_rows<kFrom, kTo, kRowsA, kRowsB>(c[kPart], a, b + (kRowsB * 128 >> 4), 1);
    multiply_along_rows<kFrom, kTo, kRowsA, kRowsB>(c[kPart], a, b, 1);
    if constexpr (kPart + 1 < kParts) start_parts<kBatch, kPart + 1>(a, b);
  }
  // Once it is there.
  template <int kBatch>
  DEVICE void take(float (&sum)[1][kN][4]) {
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      settle(c[part]);
      for_each(sum, [&](float& x, int, int n, int e) {
        x = kBatch + part ? x + c[part][n][e] : c[part][n][e];
      });
    }
  }
  // All of it, from the start.
  DEVICE void make(float (&sum)[1][kN][4], u64 a, u64 b) {
    start<0>(a, b);
    products_wait<0>();
    take<0>(sum);
    finish(sum, a, b);
  }
  // What is left after the first batch.
  DEVICE void finish(float (&sum)[1][kN][4], u64 a, u64 b) {
    if constexpr (kBatches == 2) {
      start<1>(a, b);
      products_wait<0>();
      take<1>(sum);
    }
  }
};

// Times the weights of a product's columns.
DEVICE void weigh_columns(float (&c)[kN][4], const float* weights, float unit = 1) {
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < kN; n++) {
    const float2 of_column = *(const float2*)(weights + n * 8 + 2 * t);
#pragma unroll
    for (int e = 0; e < 4; e++) c[n][e] *= unit * (e & 1 ? of_column.y : of_column.x);
  }
}

// Products of pairs that may have lost too much become NaN, for `repair` of blocks.cuh. Each has a
// number of its row, of which `top` is the warp's largest, and one of its column.
template <class Exact>
DEVICE void keep_exact(float (&c)[kN][4], const float (&of_rows)[2], float top,
                       const float* of_columns, Exact exact) {
  bool all = true;
#pragma unroll
  for (int j = threadIdx.x & 31; j < kN * 8; j += 32) all = all && exact(top, of_columns[j]);
  if (__all_sync(~0u, all)) return;
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < kN; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (!exact(of_rows[e >> 1], of_columns[n * 8 + 2 * t + (e & 1)]))
        c[n][e] = infinity(float()) - infinity(float());
}

// A thread's two rows of the products: what S and dP of halves are multiplied by, beside weights of
// columns, and what their pairs may lose by them.
struct Sides {
  float score[2], gradient[2], size[2], spread[2], top_size, top_spread;

  // From the weights of row g of the warp's rows, the second with spreads kRows behind.
  template <int kRows>
  DEVICE void load(const float* of_score, const float* of_gradient, float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      score[half] = of_score[8 * half];
      gradient[half] = of_gradient[8 * half];
      size[half] = max_of(abs_of(score[half] * scale), 0x1p-78f);
      spread[half] = of_gradient[kRows + 8 * half];
    }
    top_size = warp_max(max_of(size[0], size[1]));
    top_spread = warp_max(max_of(spread[0], spread[1]));
  }
  // What float16 has lost of a row of q or k, 2^-40 of its largest, is less than 2^-25 of a score
  // unless numbers are large. The bound of `size` keeps away numbers that are too large for one of
  // the two, beside numbers that are too small.
  DEVICE void keep_scores(float (&s)[kN][4], const float* weights) const {
    constexpr float kLargest = 0x1p-15f / (kD == 64 ? 8 : 11.3137085);  // the root of kD
    keep_exact(s, size, top_size, weights,
               [](float a, float b) { return a * b <= kLargest; });
  }
  // S and dP of halves to what they stand for, for the careful kernels.
  DEVICE void finish(float (&s)[kN][4], float (&dp)[kN][4], const float* of_score,
                     const float* of_gradient, int count) const {
    weigh_columns(s, of_score);
    weigh_columns(dp, of_gradient);
    keep_scores(s, of_score);
    keep_gradients(dp, of_gradient + count);
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[n][e] *= score[e >> 1];
        dp[n][e] *= gradient[e >> 1];
      }
  }
  // Of dP there is no such measure. The spread of a row is the mean of log2(largest / x), and what
  // halves lose of a product of two rows is small beside the sum of its terms' magnitudes unless
  // the two spreads are large.
  DEVICE void keep_gradients(float (&dp)[kN][4], const float* spreads) const {
    keep_exact(dp, spread, top_spread, spreads, [](float a, float b) { return a + b <= 20; });
  }
};

// Products that are not finite, for the careful kernels; place is of a row and a key.
template <class PlaceOf>
DEVICE void repair_products(const Params& p, float (&s)[1][kN][4], float (&dp)[1][kN][4], int b,
                            int h, PlaceOf place) {
  const Entry entry = entry_of(p, b);
  const int kv_head = h / (int)p.group;
  auto row_of = [&](const Array& array) {
    return [&](Place at) {
      return at.r < entry.q_len ? array.at(b, h) + at.r * array.row : nullptr;
    };
  };
  auto key_of = [&](const Array& array) {
    return [&](Place at) {
      return at.c < entry.kv_len ? array.at(b, kv_head) + at.c * array.row : nullptr;
    };
  };
  repair(s, p.q, p.k, p.D, place, row_of(p.q), key_of(p.k));
  repair(dp, p.dout, p.v, p.Dv, place, row_of(p.dout), key_of(p.v));
}

// A factor of the second products and what undoes its rows' powers of two.
struct Factor {
  u32 x[2][kN / 2][4];  // hi, lo
  float down[2];

  // Of P or dS, which is unbounded, times the weights of its columns. It is taken to the size of
  // the results, since small numbers are flushed to 0 on the way.
  DEVICE void take(float (&c)[kN][4], const float* weights) {
    weigh_columns(c, weights, 0x1p14f);
    float up[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = 0;
#pragma unroll
      for (int n = 0; n < kN; n++)
        top = max_of(top, max_of(abs_of(c[n][2 * half]), abs_of(c[n][2 * half + 1])));
      const int exponent = min_of(exponent_to_halves(quad_max(top)), 239);
      up[half] = power(exponent);
      down[half] = power(254 - 14 - exponent);
    }
    to_factor(x, c, up);
  }
};

// sum += factor x tile, whose kRows rows are summed over.
template <int kRows, int N>
DEVICE void add_product(float (&sum)[1][N][4], const Factor& factor, u64 tile) {
#pragma unroll
  for (int panel = 0; panel < N / 8; panel++) {
    const u64 hi = tile + (panel * 2 * kRows * 128 >> 4), lo = hi + (kRows * 128 >> 4);
    float part[8][4];
    products_fence();
    multiply_registers(part, factor.x[1], hi, 0);
    multiply_registers(part, factor.x[0], lo, 1);
    multiply_registers(part, factor.x[0], hi, 1);
    products_commit();
    products_wait<0>();
    settle(part);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float& x = sum[0][panel * 8 + n][e];
        x = fma_of(part[n][e], factor.down[e >> 1], x);
      }
  }
}

// A block's results to memory, through shared memory: row(r) is the address of its row r, or null.
template <int N, class RowOf>
DEVICE void write_results(const float (&c)[1][N][4], double scale, char* shared, const Array& array,
                          int width, int mode, RowOf row) {
  if (array.data)
    write_blocks(c, mode == kTaint ? 1 : (float)scale, shared, array, width, mode, row);
}
