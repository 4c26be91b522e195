// dQ of float32 on Hopper, the careful way: what hopper_halves_q.cu computes, in the same
// arithmetic and to the same bits, one thing after the other and loaded by ordinary loads.
//
// Tiles whose flag is set, which did not all end finite, are computed again in the modes kClean and
// kTaint of backward_q.cu. Without flags, for arrays that tensor maps cannot take, all tiles are
// computed here, first in the usual mode.

static_assert(kThreads == 128 * kGroups, "");

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_careful_halves_q(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char shared[];
  char* const sQ = shared;
  char* const sO = sQ + kBytesQ;
  char* const sK = sO + kBytesO;
  char* const sV = sK + kBytesK;
  float* const weights_q = (float*)(sV + kBytesV);
  float* const weights_o = weights_q + 2 * kBr;  // each with spreads
  float* const weights_k = weights_o + 2 * kBr;
  float* const weights_v = weights_k + 2 * kBc;
  const i64 total = p.tiles * p.Hq * p.batch;
  constexpr int kFlags = 4 * kGroups;
  if (p.flags && !any_flagged<kFlags>(p, total)) return;

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, r = warp * 16 + (lane >> 2);
  const u64 of_q = along_rows(shared_address(sQ) + (warp >> 2) * 64 * 128);
  const u64 of_o = along_rows(shared_address(sO) + (warp >> 2) * 64 * 128);
  const u64 of_k = along_rows(shared_address(sK)), of_v = along_rows(shared_address(sV));
  const u64 turned_k = along_columns<kBc>(shared_address(sK));
#pragma unroll 1
  for (i64 index = blockIdx.x; index < total; index += gridDim.x) {
    if (p.flags && !flagged<kFlags>(p, index)) continue;
    const Work work = work_of(p, index);
    const int b = work.b, h = work.h, kv_head = h / (int)p.group, i = work.row0 + r;
    const int q_rows = entry_of(p, b).q_len - work.row0, kv_len = entry_of(p, b).kv_len;
    Rows rows;
    rows.load(p, work, i);

#pragma unroll 1
    for (int mode = p.flags ? kClean : kUsual;; mode = mode == kUsual ? kClean : kTaint) {
      float dq[1][kO][4];
      Earlier<1, kO> earlier;
      clear(dq);
      clear(earlier);
      __syncthreads();
      load_halves_carefully<kOfRows, kBr, kD>(sQ, weights_q, p.q,
                                              p.q.at(b, h) + work.row0 * p.q.row, q_rows,
                                              (int)p.D, kUsual);
      load_halves_carefully<kOfRows, kBr, kDv>(
          sO, weights_o, p.dout, p.dout.at(b, h) + work.row0 * p.dout.row, q_rows, (int)p.Dv,
          kUsual);
#pragma unroll 1
      for (int n = work.from; n < work.to; n++) {
        const int j0 = n * kBc;
        auto load_k = [&](int mode) {
          load_halves_carefully<kOfRows, kBc, kD>(sK, weights_k, p.k,
                                                  p.k.at(b, kv_head) + j0 * p.k.row, kv_len - j0,
                                                  (int)p.D, mode);
        };
        if (n > work.from && n % (kRowsOfPart / kBc) == 0) end_part<false>(earlier, dq, kOnes);
        Product<kBr, kBc> scores, gradients;
        Factor factor;
        Sides sides;
        float s[1][kN][4], dp[1][kN][4];
        load_k(kUsual);
        load_halves_carefully<kOfRows, kBc, kDv>(
            sV, weights_v, p.v, p.v.at(b, kv_head) + j0 * p.v.row, kv_len - j0, (int)p.Dv, kUsual);
        writes_to_async();
        __syncthreads();
        sides.load<kBr>(weights_q + r, weights_o + r, (float)p.scale);
        scores.make(s, of_q, of_k);
        gradients.make(dp, of_o, of_v);
        sides.finish(s[0], dp[0], weights_k, weights_v, kBc);
        if (mode != kUsual) {
          auto place = [&](int, int y, int e) {
            return Place{i + (e >> 1) * 8, j0 + y * 8 + 2 * (lane & 3) + (e & 1)};
          };
          repair_products(p, s, dp, b, h, place);
        }
        exclude(p, b, s, i, j0);
        for_each(dp, [&](float& y, int m, int z, int e) {
          y = gradient<true>(p, s[m][z][e], y, rows.lse[e >> 1], rows.delta[e >> 1], mode).ds;
        });
        if (mode != kUsual) {
          __syncthreads();
          load_k(mode);
          writes_to_async();
          __syncthreads();
        }
        factor.take(dp[0], weights_k);
        add_product<kBc>(dq, factor, turned_k);
        __syncthreads();
      }
      add_earlier<false>(dq, earlier, kOnes);
      const bool odd = __syncthreads_or(finish(dq[0], rows));
      if (mode == kUsual && odd) continue;
      write_results(dq, p.scale, shared, p.dq, (int)p.D, mode, [&](int r) -> char* {
        return work.row0 + r < p.Lq ? p.dq.at(b, h) + (work.row0 + r) * p.dq.row : nullptr;
      });
      if (mode == kUsual || mode == kTaint) break;
    }
  }
}
