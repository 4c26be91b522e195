// dK = scale dS^T Q and dV = (z P)^T dO: a block owns kBc keys of a key head and walks over the rows
// that see them, of each query head in turn. Everything is transposed, keys are the rows of the matrix
// products, so that P^T and dS^T are factors as they lie in registers:
//
//     S^T = K Q^T,  dP^T = V dO^T,  P^T = exp(S^T - lse),  dV += (z P^T) dO,  dK += dS^T Q
//
// Q has two buffers, dO one. Sums of wide heads do not fit in registers: blocks share out the columns,
// kOut and kOutV of them each. As in forward.cu, a block that does not end finite is done again: kClean
// with 0 for what is not finite in Q and dO once the scores are made, then kTaint.

constexpr int kM = kBc / (16 * kWarps), kN = kBr / 8;
constexpr int kOut = kD > 128 ? kD / 2 : kD, kOutV = kDv > 128 ? kDv / 2 : kDv;

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
backward_kv(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  Tile* const sK = (Tile*)shared;
  Tile* const sV = sK + kBc * pitch_of(kD);
  Tile* const sO = sV + kBc * pitch_of(kDv);
  Tile* const sQ = sO + kBr * pitch_of(kDv);
  constexpr int kBuffer = kBr * pitch_of(kD);
  Acc* const sRows = (Acc*)(sQ + (kWalk ? 1 : 2) * kBuffer);  // two buffers of lse and delta
  Acc* const added = sRows + 4 * kBr;                         // these two in kGeneral only
  u8* const kept = (u8*)(added + kBr * kAddedPitch);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;

  i64 index = blockIdx.x;
  const int piece = (int)(index % p.pieces);
  const Turn turn = turn_of(index / p.pieces, p.tiles, p.batch * p.Hkv);
  const int b = (int)(turn.head / p.Hkv), kv_head = (int)(turn.head % p.Hkv);
  const Entry entry = entry_of(p, b);
  const int key0 = turn.tile * kBc, last_key = min_of(key0 + kBc, entry.kv_len) - 1;
  const int begin = first_row(entry, key0), end = key0 < entry.kv_len ? end_of_rows(entry, last_key) : 0;
  const int from = begin / kBr, to = end > begin ? (end + kBr - 1) / kBr : from;
  const int steps = (to - from) * (int)p.group;
  const int column0 = piece * kOut, column0_v = piece * kOutV;

  const char* const of_k = p.k.at(b, kv_head);
  const char* const of_v = p.v.at(b, kv_head);
  const int keys = entry.kv_len - key0;
  auto load_k = [&](int at) {
    load_tile<kBc, kD>(sK, p.k, of_k + key0 * p.k.row + at * p.k.column, keys, (int)p.D - at);
  };
  auto load_v = [&](int at) {
    load_tile<kBc, kDv>(sV, p.v, of_v + key0 * p.v.row + at * p.v.column, keys, (int)p.Dv - at);
  };
  // A step is a tile of one query head; heads come one after the other.
  struct Step { int h, row0; };
  const Step first = {kv_head * (int)p.group, from * kBr};
  auto after = [&](Step at) { return at.row0 + kBr < to * kBr ? Step{at.h, at.row0 + kBr} : Step{at.h + 1, first.row0}; };
  auto load_q = [&](Tile* to, Step step, int at) {
    const char* const row = p.q.at(b, step.h) + step.row0 * p.q.row + at * p.q.column;
    load_tile<kBr, kD>(to, p.q, row, entry.q_len - step.row0, (int)p.D - at);
  };
  auto load_o = [&](Step step, int at) {
    const char* const row = p.dout.at(b, step.h) + step.row0 * p.dout.row + at * p.dout.column;
    load_tile<kBr, kDv>(sO, p.dout, row, entry.q_len - step.row0, (int)p.Dv - at);
  };
  auto load_numbers = [&](Step step, int x) {
    constexpr int kEach = 16 / sizeof(Acc), kCopies = kBr / kEach;
    Acc* const to_rows = sRows + x % 2 * 2 * kBr;
    const i64 row = row_start(p, b, step.h) + step.row0;
    for (int y = threadIdx.x; y < 2 * kCopies; y += kThreads) {
      const Acc* const rows = (const Acc*)(y < kCopies ? p.row_lse : p.row_delta);
      copy_16_bytes(to_rows + y * kEach, rows + row + y % kCopies * kEach, true);
    }
  };
  const Tile* const warp_k = sK + warp * kM * 16 * pitch_of(kD);
  const Tile* const warp_v = sV + warp * kM * 16 * pitch_of(kDv);
  const Acc ones[kM][2] = {};

  for (int mode = kUsual;; mode = mode == kUsual ? kClean : kTaint) {
    Acc dk[kM][kOut / 8][4], dv[kM][kOutV / 8][4];
    clear(dk);
    clear(dv);
    __syncthreads();
    if (steps) {
      if (!kWalk) {
        load_k(0);
        load_v(0);
        load_q(sQ, first, 0);
        load_o(first, 0);
      }
      load_numbers(first, 0);
      copies_commit();
    }
    Step step = first;
#pragma unroll 1
    for (int x = 0; x < steps; x++, step = after(step)) {
      const int row0 = step.row0;
      Tile* const tile_q = kWalk ? sQ : sQ + x % 2 * kBuffer;
      const Acc* const rows = sRows + x % 2 * 2 * kBr;
      Acc s[kM][kN][4], dp[kM][kN][4];
      clear(s);
      clear(dp);
#if kGeneral
      fill_added(p, entry, added, kept, key0,
                 [&](int r) { return row0 + r < p.Lq ? Row{row0 + r, step.h} : Row{kFar, 0}; });
#endif
      auto multiply_k_q = [&] {
        if (kWalk)
          walk_rows<kD>(s, warp_k, sQ, (int)p.D, load_k, [&](int at) { load_q(sQ, step, at); });
        else
          multiply_rows<kD / kStep>(s, warp_k, pitch_of(kD), tile_q, pitch_of(kD));
      };
      copies_wait<0>();
      __syncthreads();
      if (x + 1 < steps) {
        if (!kWalk) load_q(sQ + (x + 1) % 2 * kBuffer, after(step), 0);
        load_numbers(after(step), x + 1);
      }
      copies_commit();
      multiply_k_q();
      if (kWalk)
        walk_rows<kDv>(dp, warp_v, sO, (int)p.Dv, load_v, [&](int at) { load_o(step, at); });
      else
        multiply_rows<kDv / kStep>(dp, warp_v, pitch_of(kDv), sO, pitch_of(kDv));
      auto place = [&](int m, int y, int e) {
        return Place{y * 8 + 2 * t + (e & 1), (warp * kM + m) * 16 + (e >> 1) * 8 + g};
      };
      const int last_row = min_of(row0 + kBr, entry.q_len) - 1;
      auto row_at = [&](const char* of, const Array& array, int r) {
        return row0 + r < entry.q_len ? of + (row0 + r) * array.row : nullptr;
      };
      auto key_at = [&](const char* of, const Array& array, int c) {
        return key0 + c < entry.kv_len ? of + (key0 + c) * array.row : nullptr;
      };
      auto repair_scores = [&] {
        if (kSplit && mode != kUsual)
          repair(s, p.q, p.k, p.D, place, [&](Place at) { return row_at(p.q.at(b, step.h), p.q, at.r); },
                 [&](Place at) { return key_at(of_k, p.k, at.c); });
      };
      repair_scores();
      if (kSplit && mode != kUsual)
        repair(dp, p.dout, p.v, p.Dv, place, [&](Place at) { return row_at(p.dout.at(b, step.h), p.dout, at.r); },
               [&](Place at) { return key_at(of_v, p.v, at.c); });
      score(p, s, added, mode == kUsual && all_pairs(entry, row0, last_row, key0, kBc), place,
            [&](int m, int half) { return rows_of_key(entry, key0 + hidden(place(m, 0, 2 * half).c), row0); });
      // s becomes z P (without z's constant factor), dp becomes dS.
      auto make_p_and_ds = [&](auto care) {
        for_each(s, [&](Acc& y, int m, int n, int e) {
          const Place at = place(m, n, e);
          Acc z = 1;
          bool stays = true;
#if kGeneral
          if (p.dropout_threshold) {
            stays = is_kept(kept, at);
            z = stays ? (Acc)p.keep_scale : 0;
          }
#endif
          const Gradient of = gradient<decltype(care)::value>(p, y, z * dp[m][n][e], rows[at.r],
                                                              rows[kBr + at.r], mode);
          y = stays || mode == kTaint ? of.p : of.p * 0;
          dp[m][n][e] = of.ds;
        });
      };
      mode == kUsual ? make_p_and_ds(Usual()) : make_p_and_ds(Careful());
      if (kWalk) {
        __syncthreads();
        load_o(step, column0_v);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
      }
      if (mode != kUsual) sanitize<kBr, kDv>(sO, mode);
      multiply_blocks<false>(dv, s, sO + (kWalk ? 0 : column0_v), pitch_of(kDv), ones);
#if kGeneral
      if (p.softcap != 0 && mode != kTaint) {
        clear(s);
        multiply_k_q();
        repair_scores();
        for_each(dp, [&](Acc& ds, int m, int n, int e) { ds = ds == 0 ? 0 : ds * slope(p, s[m][n][e]); });
      }
#endif
      __syncthreads();
      if (kWalk) {
        load_q(sQ, step, column0);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
      } else {
        if (x + 1 < steps) load_o(after(step), 0);
        copies_commit();
      }
      if (mode != kUsual) sanitize<kBr, kD>(tile_q, mode);
      multiply_blocks<false>(dk, dp, tile_q + (kWalk ? 0 : column0), pitch_of(kD), ones);
    }
    copies_wait<0>();
    const bool odd = __syncthreads_or(any_odd(dk) || any_odd(dv));
    if (mode == kUsual && odd) continue;
    if (p.dk.data)
      write_blocks(dk, (Acc)(mode == kTaint ? 1.0 : p.scale), shared, p.dk, min_of((int)p.D - column0, kOut), mode,
                   [&](int r) -> char* {
        return key0 + r < p.Lk ? p.dk.at(b, kv_head) + (key0 + r) * p.dk.row + column0 * p.dk.column : nullptr;
      });
    if (p.dv.data)
      write_blocks(dv, (Acc)(mode == kTaint ? 1.0 : p.keep_scale), shared, p.dv, min_of((int)p.Dv - column0_v, kOutV),
                   mode, [&](int r) -> char* {
        return key0 + r < p.Lk ? p.dv.at(b, kv_head) + (key0 + r) * p.dv.row + column0_v * p.dv.column : nullptr;
      });
    if (mode == kUsual || mode == kTaint) return;
  }
}
