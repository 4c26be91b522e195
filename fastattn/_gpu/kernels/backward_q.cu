// dQ = scale dS K: a block owns kBr query rows and walks over the keys they see. Of each tile
//
//     S = Q K^T,  dP = dO V^T,  P = exp(S - lse),  dS = P (z dP - delta),  dQ += dS K
//
// The rows' sums of dS |i + offset - j|, from which the gradient of ALiBi's slopes is made, come
// along. K has two buffers, V one. As in forward.cu, a block that does not end finite is done
// again: kClean with 0 for what is not finite in K, then kTaint.

constexpr int kM = kBr / (16 * kWarps), kN = kBc / 8, kO = kD / 8;

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
backward_q(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  Tile* const sQ = (Tile*)shared;
  Tile* const sO = sQ + kBr * pitch_of(kD);
  Tile* const sV = sO + kBr * pitch_of(kDv);
  Tile* const sK = sV + kBc * pitch_of(kDv);
  constexpr int kBuffer = kBc * pitch_of(kD);
  char* const added = (char*)(sK + (kWalk ? 1 : 2) * kBuffer);  // tiles of a mask and bias
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;

  int index = blockIdx.x;
  const int piece = kWalk ? index % (int)p.pieces : 0;
  if (kWalk) index /= (int)p.pieces;
  const Turn turn = turn_of(index, (int)p.tiles, (int)(p.batch * p.Hq));
  const int b = turn.head / (int)p.Hq, h = turn.head % (int)p.Hq, kv_head = h / (int)p.group;
  const Entry entry = entry_of(p, b);
  const int row0 = ((int)p.tiles - 1 - turn.tile) * kBr, rows = (int)p.Lq;
  auto row_of = [&](int r) { return row0 + r < rows ? Row{row0 + r, h} : Row{kFar, 0}; };
  const int last = min_of(min_of(row0 + kBr, rows), entry.q_len) - 1;
  const int begin = first_key(entry, row0), end = row0 < entry.q_len ? end_of_keys(entry, last) : 0;
  const int from = begin / kBc, to = end > begin ? (end + kBc - 1) / kBc : from;
  const int column0 = piece * kD;

  const char* const of_q = p.q.at(b, h);
  const char* const of_o = p.dout.at(b, h);
  const char* const of_k = p.k.at(b, kv_head);
  const char* const of_v = p.v.at(b, kv_head);
  const int q_rows = entry.q_len - row0;
  auto load_q = [&](int at) {
    load_tile<kBr, kD>(sQ, p.q, of_q + row0 * p.q.row + at * p.q.column, q_rows, (int)p.D - at);
  };
  auto load_o = [&](int at) {
    load_tile<kBr, kDv>(sO, p.dout, of_o + row0 * p.dout.row + at * p.dout.column, q_rows,
                        (int)p.Dv - at);
  };
  auto load_k = [&](Tile* to, int n, int at) {
    const int j = n * kBc;
    load_tile<kBc, kD>(to, p.k, of_k + j * p.k.row + at * p.k.column, entry.kv_len - j,
                       (int)p.D - at);
  };
  auto load_v = [&](int n, int at) {
    const int j = n * kBc;
    load_tile<kBc, kDv>(sV, p.v, of_v + j * p.v.row + at * p.v.column, entry.kv_len - j,
                        (int)p.Dv - at);
  };

  // Tiles of keys that hold no pair are no steps of the walk.
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

  Acc lse[kM][2], delta[kM][2];
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const i64 row = row_start(p, b, h) + row0 + (warp * kM + m) * 16 + half * 8 + g;
      lse[m][half] = ((const Acc*)p.row_lse)[row];
      delta[m][half] = ((const Acc*)p.row_delta)[row];
    }
  const Tile* const warp_q = sQ + warp * kM * 16 * pitch_of(kD);
  const Tile* const warp_o = sO + warp * kM * 16 * pitch_of(kDv);
  const Acc ones[kM][2] = {};

  for (int mode = kUsual;; mode = mode == kUsual ? kClean : kTaint) {
    Acc dq[kM][kO][4];
    Earlier<kM, kO> earlier;
    Total distances[kM][2] = {};
    clear(dq);
    if (kTwoLevelsBackward) clear(earlier);
    __syncthreads();
    if (!kWalk && first_step.n < to) {
      load_q(0);
      load_o(0);
      load_k(sK, first_step.n, 0);
      load_v(first_step.n, 0);
    }
#if kOptions
    if (first_step.n < to)
      load_added(p, first_step.needs, added, b, h, row0, first_step.n * kBc, row_of);
#endif
    copies_commit();
    Step step = first_step, next_step;
    bool part_ends = false;
#pragma unroll 1
    for (int x = 0; step.n < to; x++, step = next_step) {
      const int n = step.n;
      if (kTwoLevelsBackward && part_ends) end_part<false>(earlier, dq, ones);
      next_step = seek(n + 1);
      Tile* const tile_k = kWalk ? sK : sK + x % 2 * kBuffer;
      Acc s[kM][kN][4], dp[kM][kN][4];
      clear(s);
      clear(dp);
      copies_wait<0>();
      __syncthreads();
      if (!kWalk) {
        if (next_step.n < to) load_k(sK + (x + 1) % 2 * kBuffer, next_step.n, 0);
        copies_commit();
      }
      auto place = [&](int m, int x, int e) {
        return Place{(warp * kM + m) * 16 + (e >> 1) * 8 + g, x * 8 + 2 * t + (e & 1)};
      };
#if kOptions
      Kept<kM, kN> kept;  // drawn while registers are free
      if (asks_dropout(p)) kept = draw<false, kM, kN>(p, b, n * kBc, place, row_of);
#endif
      auto multiply = [&](auto rounded) {
        constexpr bool kRounded = decltype(rounded)::value;
        if (kWalk) {
          walk_rows<kD, kRounded>(s, warp_q, sK, (int)p.D, load_q,
                                  [&](int at) { load_k(sK, n, at); });
          walk_rows<kDv, kRounded>(dp, warp_o, sV, (int)p.Dv, load_o,
                                   [&](int at) { load_v(n, at); });
        } else if constexpr (kRounded) {
          multiply_rows_rounded<kD / kStep>(s, warp_q, pitch_of(kD), tile_k, pitch_of(kD));
          multiply_rows_rounded<kDv / kStep>(dp, warp_o, pitch_of(kDv), sV, pitch_of(kDv));
        } else {
          multiply_rows<kD / kStep>(s, warp_q, pitch_of(kD), tile_k, pitch_of(kD));
          multiply_rows<kDv / kStep>(dp, warp_o, pitch_of(kDv), sV, pitch_of(kDv));
        }
      };
      if (kTruncates && asks_alibi(p) && p.row_sum) multiply(Rounded());
      else multiply(Truncated());
      auto row_at = [&](const char* of, const Array& array, int r) {
        return row0 + r < entry.q_len ? of + (row0 + r) * array.row : nullptr;
      };
      auto key_at = [&](const char* of, const Array& array, int c) {
        return n * kBc + c < entry.kv_len ? of + (n * kBc + c) * array.row : nullptr;
      };
      if (kSplit && mode != kUsual) {
        repair(s, p.q, p.k, p.D, place, [&](Place at) { return row_at(of_q, p.q, at.r); },
               [&](Place at) { return key_at(of_k, p.k, at.c); });
        repair(dp, p.dout, p.v, p.Dv, place, [&](Place at) { return row_at(of_o, p.dout, at.r); },
               [&](Place at) { return key_at(of_v, p.v, at.c); });
      }
#if kOptions
      apply_factors(p, s, dp, p.dq.data, kept, [&](int m, int, int e) { return delta[m][e >> 1]; });
      apply_options<false>(p, entry, s, step.needs, mode, added, n * kBc, place, row_of);
#endif
      if (mode != kUsual || !all_pairs(entry, row0, last, n * kBc, kBc))
        keep_within(s, [&](int m, int half) {
          return keys_of_row(entry, row0 + hidden(place(m, 0, 2 * half).r), n * kBc);
        });
      auto make_ds = [&](auto care) {
        for_each(s, [&](Acc& x, int m, int y, int e) {
          dp[m][y][e] = gradient<decltype(care)::value>(p, x, dp[m][y][e], lse[m][e >> 1],
                                                        delta[m][e >> 1], mode).ds;
        });
      };
      mode == kUsual ? make_ds(Usual()) : make_ds(Careful());
#if kOptions
      if (p.row_sum) {
        Acc sum[kM][2] = {};
        with_distances<false>(entry, dp, n * kBc, place, row_of,
                              [&](Acc& ds, int m, int, int e, Acc distance) {
                                sum[m][e >> 1] += ds == 0 ? 0 : ds * distance;
                              });
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int half = 0; half < 2; half++) distances[m][half].add(sum[m][half]);
      }
#endif
      __syncthreads();
#if kOptions
      if (next_step.n < to)
        load_added(p, next_step.needs, added, b, h, row0, next_step.n * kBc, row_of);
#endif
      if (kWalk) {
        load_k(sK, n, column0);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
      } else {
        if (next_step.n < to) load_v(next_step.n, 0);
        copies_commit();
      }
      if (mode != kUsual) sanitize<kBc, kD>(tile_k, mode);
      if (!asks_alibi(p) || p.dq.data) multiply_blocks<false>(dq, dp, tile_k, pitch_of(kD), ones);
      part_ends = next_step.n * kBc / kRowsOfPart != n * kBc / kRowsOfPart;
    }
    if (kTwoLevelsBackward) add_earlier<false>(dq, earlier, ones);
    copies_wait<0>();
    bool odd = false;
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (lse[m][half] == infinity(Acc())) {  // no pair takes part, whatever the sums say
          distances[m][half] = Total();
#pragma unroll
          for (int x = 0; x < kO; x++) dq[m][x][2 * half] = dq[m][x][2 * half + 1] = 0;
        }
    odd = any_odd(dq);
#pragma unroll
    for (int m = 0; m < kM; m++)
      odd = odd || !finite(distances[m][0].sum()) || !finite(distances[m][1].sum());
    odd = __syncthreads_or(odd);
    if (mode == kUsual && odd) continue;
    if (p.row_sum && piece == 0 && mode != kTaint)
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const Acc sum = (Acc)quad_sum(distances[m][half].sum());
          const i64 row = row_start(p, b, h) + row0 + (warp * kM + m) * 16 + half * 8 + g;
          if (t == 0) ((Acc*)p.row_sum)[row] = sum;
        }
    if (p.dq.data)
      write_blocks(dq, (Acc)(mode == kTaint ? 1.0 : p.scale), shared, p.dq,
                   min_of((int)p.D - column0, kD), mode, [&](int r) -> char* {
                     return row0 + r < rows
                         ? p.dq.at(b, h) + (row0 + r) * p.dq.row + column0 * p.dq.column
                         : nullptr;
                   });
    if (mode == kUsual || mode == kTaint) return;
  }
}
