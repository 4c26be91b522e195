// dK and dV of float32 on Hopper, the careful way: what hopper_halves_kv.cu computes, in the same
// arithmetic and to the same bits, one thing after the other and loaded by ordinary loads.
//
// Tiles whose flag is set, which did not all end finite, are computed again in the modes kClean and
// kTaint of backward_kv.cu. Without flags, for arrays that tensor maps cannot take, all tiles are
// computed here, first in the usual mode.

static_assert(kThreads == 128 * kGroups, "");

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_careful_halves_kv(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char shared[];
  char* const sK = shared;
  char* const sV = sK + kBytesK;
  char* const sQ = sV + kBytesV;
  char* const sO = sQ + kBytesQ;
  float* const lse_rows = (float*)(sO + kBytesO);
  float* const delta_rows = lse_rows + kBr;
  float* const weights_k = delta_rows + kBr;
  float* const weights_v = weights_k + 2 * kBc;  // each with spreads
  float* const weights_q = weights_v + 2 * kBc;
  float* const weights_o = weights_q + 2 * kBr;
  const i64 total = p.tiles * p.Hkv * p.batch;
  constexpr int kFlags = 4 * kGroups;
  if (p.flags && !any_flagged<kFlags>(p, total)) return;

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, r = warp * 16 + (lane >> 2);
  const u64 of_k = along_rows(shared_address(sK) + (warp >> 2) * 64 * 128);
  const u64 of_v = along_rows(shared_address(sV) + (warp >> 2) * 64 * 128);
  const u64 of_q = along_rows(shared_address(sQ)), of_o = along_rows(shared_address(sO));
  const u64 turned_q = along_columns<kBr>(shared_address(sQ)),
            turned_o = along_columns<kBr>(shared_address(sO));
#pragma unroll 1
  for (i64 index = blockIdx.x; index < total; index += gridDim.x) {
    if (p.flags && !flagged<kFlags>(p, index)) continue;
    const Work work = work_of(p, index);
    const int b = work.b, kv_head = work.kv_head, steps = steps_of(p, work), j = work.key0 + r;
    const int keys = entry_of(p, b).kv_len - work.key0, q_len = entry_of(p, b).q_len;

#pragma unroll 1
    for (int mode = p.flags ? kClean : kUsual;; mode = mode == kUsual ? kClean : kTaint) {
      float dk[1][kO][4], dv[1][kO][4];
      Earlier<1, kO> earlier_dk, earlier_dv;
      clear(dk);
      clear(dv);
      clear(earlier_dk);
      clear(earlier_dv);
      __syncthreads();
      load_halves_carefully<kOfRows, kBc, kD>(sK, weights_k, p.k,
                                              p.k.at(b, kv_head) + work.key0 * p.k.row, keys,
                                              (int)p.D, kUsual);
      load_halves_carefully<kOfRows, kBc, kDv>(
          sV, weights_v, p.v, p.v.at(b, kv_head) + work.key0 * p.v.row, keys, (int)p.Dv, kUsual);
      Step step = first_step(p, work);
#pragma unroll 1
      for (int x = 0; x < steps; x++, step.next(work)) {
        const int h = step.h, row0 = step.n * kBr;
        auto load_rows = [&](int mode) {
          load_halves_carefully<kOfRows, kBr, kD>(sQ, weights_q, p.q,
                                                  p.q.at(b, h) + row0 * p.q.row, q_len - row0,
                                                  (int)p.D, mode);
          load_halves_carefully<kOfRows, kBr, kDv>(
              sO, weights_o, p.dout, p.dout.at(b, h) + row0 * p.dout.row, q_len - row0, (int)p.Dv,
              mode);
        };
        if (x > 0 && begins_part(work, step)) {
          end_part<false>(earlier_dk, dk, kOnes);
          end_part<false>(earlier_dv, dv, kOnes);
        }
        Product<kBc, kBr> scores, gradients;
        Factor factor;
        Sides sides;
        float s[1][kN][4], dp[1][kN][4];
        load_rows(kUsual);
        for (int x = threadIdx.x; x < kBr; x += kThreads) {
          lse_rows[x] = ((const float*)p.row_lse)[row_start(p, b, h) + row0 + x];
          delta_rows[x] = ((const float*)p.row_delta)[row_start(p, b, h) + row0 + x];
        }
        writes_to_async();
        __syncthreads();
        sides.load<kBc>(weights_k + r, weights_v + r, (float)p.scale);
        scores.make(s, of_k, of_q);
        gradients.make(dp, of_v, of_o);
        sides.finish(s[0], dp[0], weights_q, weights_o, kBr);
        if (mode != kUsual) {
          auto place = [&](int, int y, int e) {
            return Place{row0 + y * 8 + 2 * (lane & 3) + (e & 1), j + (e >> 1) * 8};
          };
          repair_products(p, s, dp, b, h, place);
        }
        exclude(p, b, s, j, row0);
#pragma unroll
        for (int n = 0; n < kN; n++) {
          const Pair lse = pair_of(lse_rows, n), delta = pair_of(delta_rows, n);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const Gradient of =
                gradient<true>(p, s[0][n][e], dp[0][n][e], lse.x[e & 1], delta.x[e & 1], mode);
            s[0][n][e] = of.p;
            dp[0][n][e] = of.ds;
          }
        }
        if (mode != kUsual) {
          __syncthreads();
          load_rows(mode);
          writes_to_async();
          __syncthreads();
        }
        factor.take(s[0], weights_o);
        add_product<kBr>(dv, factor, turned_o);
        factor.take(dp[0], weights_q);
        add_product<kBr>(dk, factor, turned_q);
        __syncthreads();
      }
      add_earlier<false>(dk, earlier_dk, kOnes);
      add_earlier<false>(dv, earlier_dv, kOnes);
      const bool odd = __syncthreads_or(!all_finite(dk[0]) || !all_finite(dv[0]));
      if (mode == kUsual && odd) continue;
      auto row_of = [&](const Array& array) {
        return [&](int r) -> char* {
          return work.key0 + r < p.Lk ? array.at(b, kv_head) + (work.key0 + r) * array.row
                                      : nullptr;
        };
      };
      write_results(dk, p.scale, shared, p.dk, (int)p.D, mode, row_of(p.dk));
      write_results(dv, 1, shared, p.dv, (int)p.Dv, mode, row_of(p.dv));
      if (mode == kUsual || mode == kTaint) break;
    }
  }
}
