// What Hopper's two forward kernels share, so that a tile has the same bits from either:
// hopper_forward.cu, the fast one, and hopper_careful.cu, which takes any array and computes again
// what did not end finite.
//
// A warpgroup owns 64 query rows; a thread has two of them, g and g + 8 of its warp's 16, shared by
// four lanes. Blocks of kBc keys are walked from the last to the first.
//
// In float32 (hopper_halves.cuh) P V of a block is made on its own and then added, since what the
// tensor cores truncate of each sum would add up; 64 columns at a time, which leaves room in
// registers.

constexpr int kGroups = kBr / 64;  // warpgroups that compute
constexpr int kN = kBc / 8, kO = kDv / 8;
// Truncated sums of more than 128 products, or 64 of float32, would be felt in lse: the rest has a
// sum of its own.
constexpr int kMostSteps = 8 / kHalves;
constexpr int kSteps = kD / 16, kFirstSteps = kSteps > kMostSteps ? kMostSteps : kSteps;
constexpr int kShares = kHalves == 2 ? kDv / 64 : 1;  // of the columns of P V
// What a block has besides its bounds (hopper_added.cuh), a bool mask's truths as they are. Bytes
// of a row.
constexpr bool kBits = has(kSegments);
constexpr int kAddedRow = kBits ? 16 : has(kBools) ? kBc + 16 : (kBc + 8) * 2;

// Rows of a query head, and the blocks of keys that they see.
struct Work {
  int row0;
  int from, to;              // blocks
  int whole_from, whole_to;  // blocks that no bound cuts

  DEVICE bool empty() const { return from >= to; }
  DEVICE bool has(int n) const { return n >= from && n < to; }
  DEVICE bool cut(int n) const { return n < whole_from || n >= whole_to; }
};

DEVICE Work work_of(const Params& p, int b, int row0, int rows) {
  const Entry entry = entry_of(p, b);
  Work w;
  w.row0 = row0;
  const int last = min_of(w.row0 + rows, entry.q_len) - 1;
  const int begin = first_key(entry, w.row0);
  const int end = w.row0 < entry.q_len ? end_of_keys(entry, last) : 0;
  w.from = begin / kBc;
  w.to = end > begin ? (end + kBc - 1) / kBc : w.from;
  w.whole_from = (max_of(last + entry.below, 0) + kBc - 1) / kBc;
  w.whole_to = max_of(min_of(w.row0 + entry.above + 1, entry.kv_len), 0) / kBc;
  return w;
}
// That of a tile, and that of the 64 rows of it that a warpgroup has.
DEVICE Work work_of_tile(const Params& p, int b, int tile) {
  return work_of(p, b, tile * kBr, kBr);
}
DEVICE Work work_of_group(const Params& p, int b, int tile, int group) {
  return work_of(p, b, tile * kBr + group * 64, 64);
}

// A block of keys, what it asks for (Needs), and which one follows; before Work::from is the end.
struct alignas(16) Step { int n, needs, next; };

// The next block that a tile of rows has to see, n or one before it.
DEVICE Step seek(const Params& p, int b, int h, int tile, int from, int n) {
  Step step = {n};
  if constexpr (kAdds) {
    for (; step.n >= from; step.n--) {
      step.needs = needs_of(p, b, h, tile, step.n);
      if (!(step.needs & kEmpty)) break;
    }
  }
  return step;
}

// A warp brings what there is for kRows rows from i0 on and the block of keys from j0 on.
template <int kRows>
DEVICE void load_added_of(const Params& p, char* to, int b, int h, int i0, int j0) {
  if constexpr (kBits) {
    bring_segments<false, kRows, 128>(p, to, b, i0, j0);
  } else {
    const Array& array = p.attn_mask.data ? p.attn_mask : p.bias;
    const char* const from = array.at(b, h) + i0 * array.row + j0 * array.column;
    const int rows = (int)p.Lq - i0, columns = (int)p.Lk - j0;
    if constexpr (has(kBools))
      bring_numbers<u8, kRows>(to, bools_pitch(p), array, from, rows, columns);
    else
      bring_numbers<Elem, kRows>(to, numbers_pitch(p), array, from, rows, columns);
  }
}

// Scores are in these units.
DEVICE double unit_of(const Params& p) { return in_natural_units(p) ? 1.0 : p.scale; }

// S = Q K^T, a batch of products.
struct Scores {
  float s[1][kN][4];
  float rest[kFirstSteps < kSteps ? kN : 1][4];

  DEVICE void start(u64 q, u64 k) {
    products_fence();
    if constexpr (kHalves == 1) {
      multiply_along_rows<0, kFirstSteps, kBr, kBc>(s[0], q, k, 0);
      if constexpr (kFirstSteps < kSteps)
        multiply_along_rows<kFirstSteps, kSteps, kBr, kBc>(rest, q, k, 0);
    } else if constexpr (kFirstSteps == kSteps) {
      start_small(s[0], q, k);
      multiply_along_rows<0, kSteps, kBr, kBc>(s[0], q, k, 1);
    } else {
      multiply_along_rows<0, kFirstSteps, kBr, kBc>(s[0], q, k, 0);
      start_small(rest, q, k);
      multiply_along_rows<kFirstSteps, kSteps, kBr, kBc>(rest, q, k, 1);
    }
    products_commit();
  }
  template <int N>
  DEVICE static void start_small(float (&c)[N][4], u64 q, u64 k) {
    multiply_along_rows<0, kSteps, kBr, kBc>(c, q + (kLowQ >> 4), k, 0);
    multiply_along_rows<0, kSteps, kBr, kBc>(c, q, k + (kLowK >> 4), 1);
  }
  // Once the products are there.
  DEVICE void finish() {
    settle(s[0]);
    if constexpr (kFirstSteps < kSteps) {
      settle(rest);
#pragma unroll
      for (int n = 0; n < kN; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[0][n][e] += rest[n][e];
    }
  }
  // Products become scores, by all options that change them; `added` is what there is for the rows
  // of the warp.
  DEVICE void apply(const Params& p, int b, RowOf row_of, const Step& step, char* added,
                    int mode = kUsual) {
    if constexpr (has(kSoftcap)) cap(p, s, [](int, int, int, Acc) {});
    if constexpr (has(kAlibi) || has(kBools) || has(kNumbers))
      apply_options<false>(p, entry_of(p, hidden(b)), s, step.needs, mode, added, step.n * kBc,
                           PlaceOf<false>(), row_of);
  }
  // What dropout leaves of P; NaN stays.
  DEVICE void drop(const Kept<1, kN>& kept) {
    for_each(s, [&](Acc& x, int m, int n, int e) { x = kept(m, n, e) ? x : x * 0; });
  }
  // -inf where bits, if there are any, or bounds, where `cut`, exclude a pair: thread row i and the
  // keys from j on.
  DEVICE void exclude(const Params& p, int b, int i, int j, const char* bits, bool cut) {
    const Entry entry = entry_of(p, hidden(b));
    exclude_others(s[0], [&](int half) {
      u32 seen = kBits && bits ? Bits<128>::of_row(bits, (threadIdx.x >> 2 & 7) + 8 * half) : ~0u;
      if (cut) seen &= bits_within<kN>(keys_of_row(entry, hidden(i) + 8 * half, j));
      return seen;
    });
  }
};

// A thread's rows so far: maximum and sum of exp(score - maximum), the sum over this lane's
// columns.
struct Rows {
  float max[2], sum[2];

  DEVICE void clear() {
    max[0] = max[1] = -infinity(float());
    sum[0] = sum[1] = 0;
  }

  // Scores become exp(score - maximum), in the modes of arrays.cuh; what was summed so far is to be
  // multiplied by scale.
  DEVICE void add(const Params& p, Scores& scores, float (&scale)[2], float log2_unit,
                  int mode = kUsual) {
    auto& s = scores.s[0];
    float high[2] = {max[0], max[1]}, safe[2], part[2][2] = {};
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        high[half] = max_of(high[half], max_of(s[n][2 * half], s[n][2 * half + 1]));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      high[half] = quad_max(high[half]);
      safe[half] = high[half] == -infinity(float()) ? 0 : high[half];
      scale[half] = mode == kTaint ? 1 : exp2_of((max[half] - safe[half]) * log2_unit);
      max[half] = high[half];
    }
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float& x = s[n][e];
        const float most = safe[e >> 1];
        // As in forward.cu: so far out, x is `most` or makes 0.
        const float factor = in_natural_units(p) && abs_of(most) > 1e36f ? 1 : log2_unit;
        // In float32 the largest is exactly 1, so that little is lost where it is all there is.
        if (kHalves == 1 && mode < kScaled)
          x = exp2_of(fma_of(x, factor, -(most * factor)));
        else if (mode < kTaint)
          x = exp2_of((x - most) * log2_unit);
        else
          x = x == -infinity(float()) ? 0 : 1;
        part[e >> 1][e & 1] += x;
      }
#pragma unroll
    for (int half = 0; half < 2; half++)
      sum[half] = fma_of(sum[half], scale[half], part[half][0] + part[half][1]);
  }
};

// a / b, of which 16 bits keep little.
DEVICE float quotient(float a, float b) {
  if constexpr (kHalves == 2) return a / b;
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(b));
  return a * y;
}

// P as a factor of the next product.
typedef u32 Factor[kHalves][kN / 2][4];

// Results in the making, a thread's columns of its two rows.
struct Results {
  float o[kO][4], lse[2];
  float block[8][4], before[2], down[2];  // float32: P V of a block; factors of o and of it

  DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < kO; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0;
    before[0] = before[1] = 1;
  }
  DEVICE void rescale(const float (&scale)[2]) {
    if constexpr (kHalves == 2) {  // when the block is added
      before[0] = scale[0];
      before[1] = scale[1];
      return;
    }
    // No row of the warp has a new maximum: the usual case once the large scores have been met.
    // Where there are few columns, looking costs as much as multiplying.
    if (kDv > 128 && __all_sync(~0u, scale[0] == 1 && scale[1] == 1)) return;
#pragma unroll
    for (int n = 0; n < kO; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) o[n][e] *= scale[e >> 1];
  }
  // P on its way to the product with v.
  DEVICE void factor_of(Factor& factor, Scores& scores, const float* weights_v) {
    if constexpr (kHalves == 1) {
      to_factor(factor[0], scores.s[0]);
    } else {
      const Scaling scaling = weigh_values(scores.s[0], weights_v);
      to_factor(factor, scores.s[0], scaling.up);
      down[0] = scaling.down[0];
      down[1] = scaling.down[1];
    }
  }
  // o += P V, a share of its columns: a batch of products.
  template <int kShare>
  DEVICE void start(const Factor& factor, u64 v) {
    products_fence();
    if constexpr (kHalves == 1) {
      multiply_registers(o, factor[0], v, 1);
    } else {
      const u64 of_share = v + (kShare * 2 * kBc * 128 >> 4);
      multiply_registers(block, factor[1], of_share, 0);
      multiply_registers(block, factor[0], of_share + (kLowV >> 4), 1);
      multiply_registers(block, factor[0], of_share, 1);
    }
    products_commit();
  }
  // Once the products are there.
  template <int kShare>
  DEVICE void end() {
    if constexpr (kHalves == 1) {
      settle(o);
    } else {
      settle(block);
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float& x = o[kShare * 8 + n][e];
          x = fma_of(x, before[e >> 1], block[n][e] * down[e >> 1]);
        }
    }
  }
  // All of it.
  DEVICE void add(const Factor& factor, u64 v) {
    start<0>(factor, v);
    products_wait<0>();
    end<0>();
    if constexpr (kShares == 2) {
      start<1>(factor, v);
      products_wait<0>();
      end<1>();
    }
  }
  // Normalise; returns whether something is not finite that a row computed. As in forward.cu.
  DEVICE bool finish(const Params& p, const Rows& rows, int b, int h, int i, int mode) {
    const int q_len = entry_of(p, b).q_len;
    const float none = -infinity(float());
    float sum[2], high[2], factor[2];
    bool exists[2], dead[2], odd = false;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      sum[half] = quad_sum(rows.sum[half]);
      high[half] = rows.max[half];
      exists[half] = i + 8 * half < q_len;
      dead[half] = !exists[half] || (high[half] == none && sum[half] == 0);
      if (high[half] != none) high[half] *= (float)unit_of(p);
      factor[half] = (mode == kScaled ? kUp : 1) * (kHalves == 2 ? kUnit : 1);
      if (has(kDropout)) factor[half] *= (float)p.keep_scale;
    }
    if (p.sinks) {
      const float sink = ((const float*)p.sinks)[h];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (!exists[half]) continue;
        const float top = max_of(high[half], sink), safe = top == none ? 0 : top;
        const float shrunk = exp2_of((high[half] - safe) * (float)kLog2e);
        factor[half] *= shrunk;
        sum[half] =
            (dead[half] ? 0 : sum[half] * shrunk) + exp2_of((sink - safe) * (float)kLog2e);
        high[half] = top;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const bool some = exists[half] && (high[half] != none || sum[half] != 0);
      const float of_sum = log_of(sum[half]), share = quotient(factor[half], sum[half]);
      lse[half] = some ? high[half] + of_sum : none;
      factor[half] = dead[half] ? 0 : share;
      odd = odd | (!dead[half] & (!finite(sum[half]) | sum[half] == 0));
    }
    if (mode == kTaint) return odd;
    if (__any_sync(~0u, dead[0] || dead[1])) {  // their sums may hold what they exclude
#pragma unroll
      for (int n = 0; n < kO; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (dead[e >> 1]) o[n][e] = 0;
    }
#pragma unroll
    for (int n = 0; n < kO; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) o[n][e] *= factor[e >> 1];
    return odd | !all_finite(o);
  }
  DEVICE void write_lse(const Params& p, int b, int h, int i, int mode) const {
    if ((threadIdx.x & 3) != 0 || mode == kTaint) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (i + 8 * half >= p.Lq) continue;
      char* const to = p.lse.at(b, h) + (i + 8 * half) * p.lse.row;
      if (mode != kScaled || !finite(load<float>(to, p.lse.access)))
        store(to, lse[half], p.lse.access);
    }
  }
  // float32 to an array of whole chunks: four lanes write 32 bytes of a row.
  DEVICE void write_pairs(const Params& p, int b, int h, int i) const {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (i + 8 * half >= p.Lq) continue;
      char* const to = p.out.at(b, h) + (i + 8 * half) * p.out.row + t * 8;
#pragma unroll
      for (int n = 0; n < kO; n++)
        if (n * 8 + 2 * t < p.Dv)
          *(float2*)(to + n * 32) = make_float2(o[n][2 * half], o[n][2 * half + 1]);
    }
  }
  // To any array, number by number, through kStage bytes of shared memory for each warp: i0 is its
  // first row.
  DEVICE void write_out(const Params& p, int b, int h, int i0, float* stage, int mode) const {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int rows = min_of((int)p.Lq - i0, 16);
#pragma unroll
    for (int n0 = 0; n0 < kO; n0 += 4) {
      __syncwarp();
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          stage[(g + (e >> 1) * 8) * 32 + n * 8 + 2 * t + (e & 1)] = o[n0 + n][e];
      __syncwarp();
      const int c = n0 * 8 + lane;
      char* to = p.out.at(b, h) + i0 * p.out.row + c * p.out.column;
#pragma unroll 1
      for (int r = 0; r < rows && c < p.Dv; r++, to += p.out.row) {
        const float x = stage[r * 32 + lane];
        if (p.out_kind == kF32) write<float>(to, x, p.out.access, mode);
        else write<Elem>(to, x, p.out.access, mode);
      }
    }
  }
};
constexpr int kStage = 16 * 32 * 4;
static_assert(kO % 4 == 0, "");
