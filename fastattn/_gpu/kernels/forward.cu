// Forward: a block owns kBr query rows and walks over the keys they see, tile by tile, with an
// online softmax (arXiv 1805.02867, 2307.08691):
//
//     S = Q K^T -> scores, excluded pairs -inf -> P = exp(S - running maximum) -> O = O scale + P V
//
// A warp owns kM x 16 rows and all columns, so rows are reduced within four lanes. K has two
// buffers, V one: V's tile arrives while S is computed, the next K's all along.
//
// Rows are those of one query head; or, where `packed`, those of all query heads of a key head,
// row = i * group + head in the group, so that few queries share the loads of their keys.
// With splits > 1 a block sees split_keys keys only, and combine.cu merges the partial results.
//
// Excluded pairs have P = 0, but 0 x NaN is NaN: a block whose rows do not all end finite is
// computed again. kClean: as before, with 0 for what is not finite in V, so that rows that see none
// of it keep their bits. kScaled, if that is still not finite: V scaled down and scores subtracted
// before they are multiplied by scale, where sums overflow though their mean does not; replaces
// what was not finite. kTaint: counts the non-finite numbers of V that each element includes, which
// make it NaN.
//
// Head sizes beyond the largest tile (kWalk): Q and K arrive in pieces of kD columns, and blocks
// share out the columns of V.

constexpr int kM = kBr / (16 * kWarps), kN = kBc / 8, kO = kDv / 8;
// Truncated sums of more than 128 products would be felt in lse.
constexpr int kScoreParts = sizeof(Tile) == 2 && kD > 128 ? 8 : kParts;
constexpr int kStage = kDv + 4;  // Acc numbers from row to row of results on their way out

// The usual pass; those that follow where it does not end finite; or all, which share their code.
// With kPassesApart the usual one has its own, so that what only the others need takes no registers
// from it.
enum Passes { kAllPasses, kUsualPass, kOtherPasses };

// True where others have to follow.
template <Passes kPasses>
DEVICE bool passes(const Params& p) {
  extern __shared__ __align__(128) char shared[];
  Tile* const sQ = (Tile*)shared;
  Tile* const sV = sQ + kBr * pitch_of(kD);
  Tile* const sK = sV + kBc * pitch_of(kDv);
  constexpr int kBuffer = kBc * pitch_of(kD);
  float* const weights_q = (float*)(sK + (kWalk ? 1 : 2) * kBuffer);  // of rows in halves
  float* const weights_k = weights_q + (kInHalves ? kBr : 0);
  float* const weights_v = weights_k + (kInHalves ? kBc : 0);
  char* const added = (char*)(weights_v + (kInHalves ? kBc : 0));  // tiles of a mask and bias
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;

  // This block's work. Tiles of a few heads are in flight together, so that their keys stay in
  // cache, and the last tiles, the longest under a causal bound, go first.
  int index = blockIdx.x;
  const int split = index % (int)p.splits;
  index /= (int)p.splits;
  const int piece = kWalk ? index % (int)p.pieces : 0;
  if (kWalk) index /= (int)p.pieces;
  const int heads = (int)(p.packed ? p.Hkv : p.Hq), group = (int)(p.packed ? p.group : 1);
  const Turn turn = turn_of(index, (int)p.tiles, heads * (int)p.batch);
  const int b = turn.head / heads, h = turn.head % heads;
  const int kv_head = p.packed ? h : h / (int)p.group;
  const Entry entry = entry_of(p, b);
  const int row0 = ((int)p.tiles - 1 - turn.tile) * kBr, rows = (int)p.Lq * group;
  auto row_of = [&](int r) {
    const int x = row0 + r;
    return x >= rows ? Row{kFar, 0}
        : group == 1 ? Row{x, h}
                     : Row{x / group, h * group + x % group};
  };

  const int column0 = piece * kDv, columns = min_of((int)p.Dv - column0, kDv);
  const int first = row_of(0).i;
  const int last = min_of(row_of(min_of(kBr, rows - row0) - 1).i, entry.q_len - 1);
  const int begin = max_of(first_key(entry, first), split * (int)p.split_keys);
  int end = end_of_keys(entry, last);
  if (p.splits > 1) end = min_of(end, (split + 1) * (int)p.split_keys);
  if (first >= entry.q_len) end = 0;
  const int from = begin / kBc, to = end > begin ? (end + kBc - 1) / kBc : from;

  auto thread_row = [&](int m, int half) { return row_of((warp * kM + m) * 16 + half * 8 + g); };

  const char* const of_q = p.q.at(b, 0);
  const char* const of_k = p.k.at(b, kv_head);
  const char* const of_v = p.v.at(b, kv_head) + (i64)column0 * p.v.column;
  auto load_q = [&](int at) {
    if (group == 1)
      return load_tile<kBr, kD>(sQ, p.q, of_q + h * p.q.head + row0 * p.q.row + at * p.q.column,
                                rows - row0, (int)p.D - at);
    load_rows<kBr, kD>(sQ, p.q, (int)p.D - at, [&](int r) -> const char* {
      const Row row = row_of(r);
      return row.i == kFar ? nullptr : of_q + row.h * p.q.head + row.i * p.q.row + at * p.q.column;
    });
  };
  auto load_k = [&](Tile* to, int n, int at) {
    const int j = n * kBc;
    load_tile<kBc, kD>(to, p.k, of_k + j * p.k.row + at * p.k.column, entry.kv_len - j,
                       (int)p.D - at);
    copies_commit();
  };
  auto load_v = [&](int n) {
    const int j = n * kBc;
    load_tile<kBc, kDv>(sV, p.v, of_v + j * p.v.row, entry.kv_len - j, columns);
    copies_commit();
  };

  // A step of the walk: a tile of keys, and what it asks for. Tiles that hold no pair are no steps.
  struct Step { int n, needs; };
  auto seek = [&](int n) {
#if kOptions
    for (; n < to; n++) {
      const int needs = needs_of(p, b, h, (int)p.tiles - 1 - turn.tile, n);
      if (!(needs & kEmpty)) return Step{n, needs};
    }
#endif
    return Step{n, 0};
  };
  const Step first_step = seek(from);

  const double natural = in_natural_units(p) ? 1.0 : p.scale;  // scores -> natural units
  const Acc unit = (Acc)natural, log2_unit = (Acc)(natural * kLog2e);
  const Acc none = -infinity(Acc());
#if kInHalves
  // Products of rows whose weights' product is larger are left to `repair`: there the 2^-40 of a
  // row's largest number that are lost may be more than 2^-25 of a score in natural units.
  const float largest_weight = (float)(0x1p-15 * rsqrtf(kD) / abs_of(p.scale));
#endif

  for (int mode = kPasses == kOtherPasses ? kClean : kUsual, next;; mode = next) {
    Acc o[kM][kO][4], row_max[kM][2], row_sum[kM][2];
    // Of kTwoLevels; `since` is the scale to this part's.
    Earlier<kM, kO> earlier;
    Acc earlier_sum[kM][2] = {}, since[kM][2];
    clear(o);
    if (kTwoLevels) clear(earlier);
#pragma unroll
    for (int m = 0; m < kM; m++) {
      row_max[m][0] = row_max[m][1] = none;
      row_sum[m][0] = row_sum[m][1] = 0;
      since[m][0] = since[m][1] = 1;
    }
    __syncthreads();
    if (!kWalk && first_step.n < to) {
      load_q(0);
      load_k(sK, first_step.n, 0);
    }
#if kOptions
    if (first_step.n < to)
      load_added(p, first_step.needs, added, b, h, row0, first_step.n * kBc, row_of);
    copies_commit();
#endif
    Step step = first_step, next_step;
#pragma unroll 1
    for (int x = 0; step.n < to; x++, step = next_step) {
      const int n = step.n;
      next_step = seek(n + 1);
      Acc s[kM][kN][4], scale[kM][2];
      clear(s);
      auto place = [&](int m, int x, int e) {
        return Place{(warp * kM + m) * 16 + (e >> 1) * 8 + g, x * 8 + 2 * t + (e & 1)};
      };
      const Tile* const warp_q = sQ + warp * kM * 16 * pitch_of(kD);
      if (kWalk) {
        walk_rows<kD>(s, warp_q, sK, (int)p.D, load_q, [&](int at) { load_k(sK, n, at); });
        copies_wait<0>();
        __syncthreads();
        load_v(n);
      } else {
        copies_wait<0>();
#if kInHalves
        if (x == 0) split_tile<kEveryRow, kBr, kD>(sQ, weights_q, kUsual);
        split_tile<kEveryRow, kBc, kD>(sK + x % 2 * kBuffer, weights_k, kUsual);
#endif
        __syncthreads();
        load_v(n);
        if (next_step.n < to) load_k(sK + (x + 1) % 2 * kBuffer, next_step.n, 0);
        else copies_commit();
      }
#if kOptions
      Kept<kM, kN> kept;  // drawn while registers are free
      if (asks_dropout(p)) kept = draw<false, kM, kN>(p, b, n * kBc, place, row_of);
#endif
      if (!kWalk)
        multiply_rows<kD / kStep, kScoreParts>(s, warp_q, pitch_of(kD), sK + x % 2 * kBuffer,
                                               pitch_of(kD));
#if kInHalves
      weigh(s, weights_q + warp * kM * 16, weights_k, largest_weight);
#endif
      if (kSplit && mode != kUsual)
        repair(s, p.q, p.k, p.D, place,
               [&](Place at) -> const char* {
                 const Row row = row_of(at.r);
                 return row.i == kFar ? nullptr : of_q + row.h * p.q.head + row.i * p.q.row;
               },
               [&](Place at) -> const char* {
                 const int j = n * kBc + at.c;
                 return j < entry.kv_len ? of_k + j * p.k.row : nullptr;
               });
      // What only a cut tile needs is computed there: hidden, or it would take the loop's
      // registers.
      const bool whole = mode == kUsual && all_pairs(entry, first, last, n * kBc, kBc);
      Limits limits[kM][2];
      if (!whole) {
        const Entry again = entry_of(p, hidden(b));
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int half = 0; half < 2; half++)
            limits[m][half] =
                keys_of_row(again, row_of(hidden((warp * kM + m) * 16 + half * 8 + g)).i, n * kBc);
      }
#if kOptions
      if (asks_softcap(p)) cap(p, s, [](int, int, int, Acc) {});
      apply_options<false>(p, entry, s, step.needs, mode, added, n * kBc, place, row_of);
#endif
      if (!whole) keep_within(s, [&](int m, int half) { return limits[m][half]; });

      // The usual path is one straight line, so that the rows' chains of operations overlap.
      Acc safe[kM][2], sum[kM][2];
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          Acc high = row_max[m][half];
#pragma unroll
          for (int x = 0; x < kN; x++)
            high = max_of(high, max_of(s[m][x][2 * half], s[m][x][2 * half + 1]));
          safe[m][half] = high;
          sum[m][half] = 0;
        }
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const Acc high = quad_max(safe[m][half]);
          safe[m][half] = high == none ? 0 : high;
          scale[m][half] = exp2_of((row_max[m][half] - safe[m][half]) * log2_unit);
          row_max[m][half] = high;
        }
      if (mode < kScaled) {
        for_each(s, [&](Acc& x, int m, int, int e) {
          const Acc most = safe[m][e >> 1];
          // So far out, where a product with log2(e) may overflow, x is `most` or makes 0.
          const Acc factor = in_natural_units(p) && abs_of(most) > (Acc)1e36 ? unit : log2_unit;
          x = exp2_of(fma_of(x, factor, -(most * factor)));
          sum[m][e >> 1] += x;
        });
      } else {
        for_each(s, [&](Acc& x, int m, int, int e) {
          x = mode == kScaled ? exp2_of((x - safe[m][e >> 1]) * log2_unit) : x == none ? 0 : 1;
          sum[m][e >> 1] += x;
          if (mode == kTaint) scale[m][e >> 1] = 1;
        });
      }
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          row_sum[m][half] = fma_of(row_sum[m][half], scale[m][half], sum[m][half]);
#if kOptions
      if (asks_dropout(p) && mode != kTaint)
        // NaN stays.
        for_each(s, [&](Acc& x, int m, int y, int e) { x = kept(m, y, e) ? x : x * 0; });
#endif
      copies_wait<kWalk ? 0 : 1>();
#if kInHalves
      split_tile<kOrdinaryApart, kBc, kDv>(sV, weights_v, mode);
#endif
      __syncthreads();
#if kOptions
      if (next_step.n < to)
        load_added(p, next_step.needs, added, b, h, row0, next_step.n * kBc, row_of);
      copies_commit();
#endif
#if kInHalves
      multiply_blocks<true>(o, s, sV, pitch_of(kDv), scale, weigh_values(s, weights_v));
#else
      if (mode != kUsual) sanitize<kBc, kDv>(sV, mode);
      multiply_blocks<true>(o, s, sV, pitch_of(kDv), scale);
#endif
      if (kTwoLevels) {
        const bool ends = next_step.n * kBc / kRowsOfPart != n * kBc / kRowsOfPart;
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int half = 0; half < 2; half++) since[m][half] *= scale[m][half];
        if (ends) {
          end_part<true>(earlier, o, since);
#pragma unroll
          for (int m = 0; m < kM; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              earlier_sum[m][half] = fma_of(earlier_sum[m][half], since[m][half], row_sum[m][half]);
              row_sum[m][half] = 0;
              since[m][half] = 1;
            }
        }
      }
      if (kWalk) __syncthreads();
    }

    if (kTwoLevels) {
      add_earlier<true>(o, earlier, since);
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          row_sum[m][half] = fma_of(earlier_sum[m][half], since[m][half], row_sum[m][half]);
    }

    // Normalise, look for what is not finite.
    bool odd = false;
    Acc lse[kM][2];
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        Acc sum = quad_sum(row_sum[m][half]), high = row_max[m][half];
        const bool exists = thread_row(m, half).i < entry.q_len,
                   dead = !exists || (high == none && sum == 0);
        if (high != none) high *= unit;
        Acc factor = (Acc)p.keep_scale;
        if (mode == kScaled) factor *= (Acc)kUp;
#if kInHalves
        factor *= kUnit;
#endif
        if (p.sinks && p.splits == 1 && exists) {
          const int head = thread_row(m, half).h;
          const Acc sink = ((const Acc*)p.sinks)[head];
          const Acc top = max_of(high, sink), safe = top == none ? 0 : top;
          const Acc shrunk = exp2_of((high - safe) * (Acc)kLog2e);
          factor *= shrunk;
          sum = (dead ? 0 : sum * shrunk) + exp2_of((sink - safe) * (Acc)kLog2e);
          high = top;
        }
        lse[m][half] = !exists || (high == none && sum == 0) ? none : high + log_of(sum);
        factor /= sum;
        odd = odd || (!dead && (!finite(sum) || sum == 0));
#pragma unroll
        for (int x = 0; x < kO; x++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) {
            if (mode != kTaint) o[m][x][e] = dead ? 0 : o[m][x][e] * factor;
            odd = odd || !finite(o[m][x][e]);
          }
      }
    odd = __syncthreads_or(odd);
    next = mode == kUsual ? kClean : mode == kClean && odd ? kScaled : kTaint;
    if (kPasses == kUsualPass && odd) return true;
    if (mode == kUsual && odd) continue;

    // Write, through shared memory: each warp passes on 16 rows of its own at a time.
    Acc* const stage = (Acc*)shared + warp * 16 * kStage;
#pragma unroll
    for (int m = 0; m < kM; m++) {
#pragma unroll
      for (int x = 0; x < kO; x++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          stage[(g + (e >> 1) * 8) * kStage + x * 8 + 2 * t + (e & 1)] = o[m][x][e];
      __syncwarp();
      const bool usual = mode == kUsual && p.splits == 1 && p.out.access == kVectors &&
                         (sizeof(Elem) != 2 || p.out_kind != kF32);
      if (usual)
        write_chunks<kDv>(stage, kStage, columns, [&](int r) -> char* {
          const Row row = row_of((warp * kM + m) * 16 + r);
          return row.i == kFar ? nullptr
                               : p.out.at(b, row.h) + row.i * p.out.row + column0 * p.out.column;
        });
#pragma unroll 1
      for (int r = usual ? 16 : 0; r < 16; r++) {
        const Row row = row_of((warp * kM + m) * 16 + r);
        const i64 flat = ((b * p.Hq + row.h) * p.Lq + row.i) * p.splits + split;
        char* const to = p.out.at(b, row.h) + row.i * p.out.row + column0 * p.out.column;
        if (row.i != kFar)
          write_row(p, to, (Acc*)p.partial_out + flat * partial_pitch(p) + column0,
                    stage + r * kStage, columns, mode);
      }
      if (t == 0 && piece == 0 && mode != kTaint)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const Row row = thread_row(m, half);
          if (row.i == kFar) continue;
          const i64 flat = ((b * p.Hq + row.h) * p.Lq + row.i) * p.splits + split;
          char* to = p.splits > 1 ? (char*)((Acc*)p.partial_lse + flat)
                                  : p.lse.at(b, row.h) + row.i * p.lse.row;
          const i64 access = p.splits > 1 ? (i64)kElements : p.lse.access;
          if (mode != kScaled || !finite(load<Acc>(to, access))) store(to, lse[m][half], access);
        }
      __syncwarp();
    }
    if (mode == kUsual || mode == kTaint) return false;
  }
}

template <Passes kPasses>
__device__ __noinline__ void passes_apart(const Params& p) { passes<kPasses>(p); }

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
forward(const __grid_constant__ Params p) {
  if constexpr (!kPassesApart) passes<kAllPasses>(p);
  else if (passes<kUsualPass>(p)) passes_apart<kOtherPasses>(p);
}
