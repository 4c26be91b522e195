// dK = scale dS^T Q and dV = (z P)^T dO: a block owns kBc keys of a key head and walks over the
// rows that see them, of each query head in turn. Everything is transposed, keys are the rows of
// the matrix products, so that P^T and dS^T are factors as they lie in registers:
//
//     S^T = K Q^T,  dP^T = V dO^T,  P^T = exp(S^T - lse),  dV += (z P^T) dO,  dK += dS^T Q
//
// Q has two buffers, dO one. Sums of wide heads do not fit in registers: blocks share out the
// columns, kOut and kOutV of them each. As in forward.cu, a block that does not end finite is done
// again: kClean with 0 for what is not finite in Q and dO once the scores are made, then kTaint.

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
  char* const added = (char*)(sRows + 4 * kBr);               // tiles of a mask and bias
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;

  const int piece = blockIdx.x % (int)p.pieces;
  const Turn turn = turn_of(blockIdx.x / (int)p.pieces, (int)p.tiles, (int)(p.batch * p.Hkv));
  const int b = turn.head / (int)p.Hkv, kv_head = turn.head % (int)p.Hkv;
  const Entry entry = entry_of(p, b);
  const int key0 = turn.tile * kBc, last_key = min_of(key0 + kBc, entry.kv_len) - 1;
  const int begin = first_row(entry, key0),
            end = key0 < entry.kv_len ? end_of_rows(entry, last_key) : 0;
  const int from = begin / kBr, to = end > begin ? (end + kBr - 1) / kBr : from;
  const int end_head = (kv_head + 1) * (int)p.group;
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
  // A step is a tile of one query head, and what it asks for; heads come one after the other. Tiles
  // that hold no pair are no steps.
  struct Step { int h, row0, needs; };
  auto seek = [&](int head, int n) {
#if kOptions
    for (; head < end_head; head++, n = from)
      for (; n < to; n++) {
        const int needs = needs_of(p, b, head, n, turn.tile);
        if (!(needs & kEmpty)) return Step{head, n * kBr, needs};
      }
    return Step{head, 0, 0};
#else
    return n < to ? Step{head, n * kBr, 0} : Step{from < to ? head + 1 : end_head, from * kBr, 0};
#endif
  };
  const Step first = seek(kv_head * (int)p.group, from);
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
  auto row_of = [&](const Step& step) {  // the rows of a step's tile
    return [&p, step](int r) {
      return step.row0 + r < p.Lq ? Row{step.row0 + r, step.h} : Row{kFar, 0};
    };
  };
  const Tile* const warp_k = sK + warp * kM * 16 * pitch_of(kD);
  const Tile* const warp_v = sV + warp * kM * 16 * pitch_of(kDv);
  const Acc ones[kM][2] = {};

  for (int mode = kUsual;; mode = mode == kUsual ? kClean : kTaint) {
    Acc dk[kM][kOut / 8][4], dv[kM][kOutV / 8][4];
    Earlier<kM, kOut / 8> earlier_dk;
    Earlier<kM, kOutV / 8> earlier_dv;
    clear(dk);
    clear(dv);
    if (kTwoLevelsBackward) {
      clear(earlier_dk);
      clear(earlier_dv);
    }
    __syncthreads();
    if (first.h < end_head) {
#if kOptions
      load_added(p, first.needs, added, b, first.h, first.row0, key0, row_of(first));
#endif
      if (!kWalk) {
        load_k(0);
        load_v(0);
        load_q(sQ, first, 0);
        load_o(first, 0);
      }
      load_numbers(first, 0);
      copies_commit();
    }
    Step step = first, next_step;
    bool part_ends = false;
#pragma unroll 1
    for (int x = 0; step.h < end_head; x++, step = next_step) {
      if (kTwoLevelsBackward && part_ends) {  // here, where registers are free
        end_part<false>(earlier_dk, dk, ones);
        end_part<false>(earlier_dv, dv, ones);
      }
      next_step = seek(step.h, step.row0 / kBr + 1);
      const int row0 = step.row0;
      Tile* const tile_q = kWalk ? sQ : sQ + x % 2 * kBuffer;
      const Acc* const rows = sRows + x % 2 * 2 * kBr;
      Acc s[kM][kN][4], dp[kM][kN][4];
      clear(s);
      clear(dp);
      copies_wait<0>();
      __syncthreads();
      if (next_step.h < end_head) {
        if (!kWalk) load_q(sQ + (x + 1) % 2 * kBuffer, next_step, 0);
        load_numbers(next_step, x + 1);
      }
      copies_commit();
      auto place = [&](int m, int y, int e) {
        return Place{y * 8 + 2 * t + (e & 1), (warp * kM + m) * 16 + (e >> 1) * 8 + g};
      };
#if kOptions
      Kept<kM, kN> kept;  // drawn while registers are free
      if (asks_dropout(p)) kept = draw<true, kM, kN>(p, b, key0, place, row_of(step));
#endif
      if (kWalk)
        walk_rows<kD>(s, warp_k, sQ, (int)p.D, load_k, [&](int at) { load_q(sQ, step, at); });
      else
        multiply_rows<kD / kStep>(s, warp_k, pitch_of(kD), tile_q, pitch_of(kD));
      if (kWalk)
        walk_rows<kDv>(dp, warp_v, sO, (int)p.Dv, load_v, [&](int at) { load_o(step, at); });
      else
        multiply_rows<kDv / kStep>(dp, warp_v, pitch_of(kDv), sO, pitch_of(kDv));
      const int last_row = min_of(row0 + kBr, entry.q_len) - 1;
      auto row_at = [&](const char* of, const Array& array, int r) {
        return row0 + r < entry.q_len ? of + (row0 + r) * array.row : nullptr;
      };
      auto key_at = [&](const char* of, const Array& array, int c) {
        return key0 + c < entry.kv_len ? of + (key0 + c) * array.row : nullptr;
      };
      if (kSplit && mode != kUsual) {
        repair(
            s, p.q, p.k, p.D, place, [&](Place at) { return row_at(p.q.at(b, step.h), p.q, at.r); },
            [&](Place at) { return key_at(of_k, p.k, at.c); });
        repair(
            dp, p.dout, p.v, p.Dv, place,
            [&](Place at) { return row_at(p.dout.at(b, step.h), p.dout, at.r); },
            [&](Place at) { return key_at(of_v, p.v, at.c); });
      }
#if kOptions
      apply_factors(p, s, dp, true, kept,
                    [&](int m, int n, int e) { return rows[kBr + place(m, n, e).r]; });
      apply_options<true>(p, entry, s, step.needs, mode, added, key0, place, row_of(step));
#endif
      if (mode != kUsual || !all_pairs(entry, row0, last_row, key0, kBc))
        keep_within(s, [&](int m, int half) {
          return rows_of_key(entry, key0 + hidden(place(m, 0, 2 * half).c), row0);
        });
      // s becomes z P (without z's constant factor), dp becomes dS.
      auto make_p_and_ds = [&](auto care) {
        for_each(s, [&](Acc& y, int m, int n, int e) {
          const Place at = place(m, n, e);
          const Gradient of = gradient<decltype(care)::value>(p, y, dp[m][n][e], rows[at.r],
                                                              rows[kBr + at.r], mode);
          y = of.p;
          dp[m][n][e] = of.ds;
        });
      };
      mode == kUsual ? make_p_and_ds(Usual()) : make_p_and_ds(Careful());
#if kOptions
      if (asks_dropout(p) && mode != kTaint)
        for_each(s, [&](Acc& y, int m, int n, int e) { y = kept(m, n, e) ? y : y * 0; });
#endif
      if (kWalk) {
        __syncthreads();
        load_o(step, column0_v);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
      }
      if (mode != kUsual) sanitize<kBr, kDv>(sO, mode);
      multiply_blocks<false>(dv, s, sO + (kWalk ? 0 : column0_v), pitch_of(kDv), ones);
      __syncthreads();
#if kOptions
      if (next_step.h < end_head)
        load_added(p, next_step.needs, added, b, next_step.h, next_step.row0, key0,
                   row_of(next_step));
#endif
      if (kWalk) {
        load_q(sQ, step, column0);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
      } else {
        if (next_step.h < end_head) load_o(next_step, 0);
        copies_commit();
      }
      if (mode != kUsual) sanitize<kBr, kD>(tile_q, mode);
      multiply_blocks<false>(dk, dp, tile_q + (kWalk ? 0 : column0), pitch_of(kD), ones);
      part_ends = next_step.h != step.h || next_step.row0 / kRowsOfPart != row0 / kRowsOfPart;
    }
    if (kTwoLevelsBackward) {
      add_earlier<false>(dk, earlier_dk, ones);
      add_earlier<false>(dv, earlier_dv, ones);
    }
    copies_wait<0>();
    const bool odd = __syncthreads_or(any_odd(dk) || any_odd(dv));
    if (mode == kUsual && odd) continue;
    if (p.dk.data)
      write_blocks(dk, (Acc)(mode == kTaint ? 1.0 : p.scale), shared, p.dk,
                   min_of((int)p.D - column0, kOut), mode, [&](int r) -> char* {
                     return key0 + r < p.Lk
                         ? p.dk.at(b, kv_head) + (key0 + r) * p.dk.row + column0 * p.dk.column
                         : nullptr;
                   });
    if (p.dv.data)
      write_blocks(dv, (Acc)(mode == kTaint ? 1.0 : p.keep_scale), shared, p.dv,
                   min_of((int)p.Dv - column0_v, kOutV), mode, [&](int r) -> char* {
                     return key0 + r < p.Lk
                         ? p.dv.at(b, kv_head) + (key0 + r) * p.dv.row + column0_v * p.dv.column
                         : nullptr;
                   });
    if (mode == kUsual || mode == kTaint) return;
  }
}
