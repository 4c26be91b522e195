// dK and dV on Hopper, the careful way: what hopper_backward_kv.cu computes, in the same arithmetic
// and to the same bits, one thing after the other and loaded by ordinary loads.
//
// Tiles whose flag is set, which did not all end finite, are computed again in the modes kClean and
// kTaint of backward_kv.cu. Without flags, for arrays that tensor maps cannot take, all tiles are
// computed here, first in the usual mode.

static_assert(kThreads == 128 * kGroups, "");

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_careful_kv(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char shared[];
  char* const sK = shared;
  char* const sV = sK + kBytesK;
  char* const sQ = sV + kBytesV;
  char* const sO = sQ + kBytesQ;
  char* const sP = sO + kBytesO;
  char* const sS = sP + kBytesP;
  float* const lse_rows = (float*)(sS + kBytesP);
  float* const delta_rows = lse_rows + kBr;
  char* const added = (char*)(delta_rows + kBr);
  const i64 total = p.tiles * p.Hkv * p.batch;
  constexpr int kFlags = 4 * kGroups;
  if (p.flags && !any_flagged<kFlags>(p, total)) return;

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const Part part(warp >> 2);
  char* const of_warp = added + (kShare ? warp * (kBytesAdded / kReaders) : added_before(warp * 16));
  const u64 of_k = along_rows(shared_address(sK) + part.key * 128);
  const u64 of_v = along_rows(shared_address(sV) + part.key * 128);
  const u64 of_q = along_rows(shared_address(sQ) + part.row * 128);
  const u64 of_o = along_rows(shared_address(sO) + part.row * 128);
  const u64 turned_q = along_columns<kBr>(shared_address(sQ) + part.panel * kBr * 128);
  const u64 turned_o = along_columns<kBr>(shared_address(sO) + part.panel * kBr * 128);
#pragma unroll 1
  for (i64 index = blockIdx.x; index < total; index += gridDim.x) {
    if (p.flags && !flagged<kFlags>(p, index)) continue;
    const Work work = work_of(p, index);
    const int b = work.b, kv_head = work.kv_head;
    const int j0 = work.key0 + part.key + warp % 4 * 16, j = j0 + (lane >> 2);
    const int keys = entry_of(p, b).kv_len - work.key0, q_len = entry_of(p, b).q_len;

#pragma unroll 1
    for (int mode = p.flags ? kClean : kUsual;; mode = mode == kUsual ? kClean : kTaint) {
      Results results;
      results.clear();
      __syncthreads();
      load_tile_carefully<kBc, kD>(sK, p.k, p.k.at(b, kv_head) + work.key0 * p.k.row, keys,
                                   (int)p.D, kUsual);
      load_tile_carefully<kBc, kDv>(sV, p.v, p.v.at(b, kv_head) + work.key0 * p.v.row, keys,
                                    (int)p.Dv, kUsual);
      Step step = seek(p, work, first_step(p, work));
#pragma unroll 1
      for (; exists(p, work, step); step = seek_after(p, work, step)) {
        const int h = step.h, row0 = step.n * kBr;
        float s[1][kN][4], dp[1][kN][4];
        u32 of_p[kN / 2][4], of_ds[kN / 2][4];
        load_tile_carefully<kBr, kD>(sQ, p.q, p.q.at(b, h) + row0 * p.q.row, q_len - row0, (int)p.D,
                                     kUsual);
        load_tile_carefully<kBr, kDv>(sO, p.dout, p.dout.at(b, h) + row0 * p.dout.row, q_len - row0,
                                      (int)p.Dv, kUsual);
        for (int r = threadIdx.x; r < kBr; r += kThreads) {
          lse_rows[r] = ((const float*)p.row_lse)[row_start(p, b, h) + row0 + r];
          delta_rows[r] = ((const float*)p.row_delta)[row_start(p, b, h) + row0 + r];
        }
        const bool adds = asks_added(step.needs);
        const RowOf row_of = {row0 + part.row, h};
        if (adds) bring_added<16>(p, of_warp, b, h, row0 + part.row, j0);
        writes_to_async();
        __syncthreads();
        start_product<kD, kBc, kBr>(s[0], of_k, of_q);
        start_product<kDv, kBc, kBr>(dp[0], of_v, of_o);
        products_wait<0>();
        settle(s[0]);
        settle(dp[0]);
        Kept<1, kN> kept;
        if constexpr (has(kDropout)) kept = draw<true, 1, kN>(p, b, j0, PlaceOf<true>(), row_of);
        if constexpr (kGeneral)
          apply_factors(p, s, dp, true, kept, [&](int, int n, int e) {
            return pair_of(delta_rows + part.row, n).x[e & 1];
          });
        apply_added(p, b, s, row_of, step.needs, j0, of_warp, mode);
        exclude(p, b, s, j, row0 + part.row, adds ? of_warp : nullptr, lane >> 2);
#pragma unroll
        for (int n = 0; n < kN; n++) {
          const Pair lse = pair_of(lse_rows + part.row, n),
                     delta = pair_of(delta_rows + part.row, n);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const Gradient of =
                gradient<true>(p, s[0][n][e], dp[0][n][e], lse.x[e & 1], delta.x[e & 1], mode);
            s[0][n][e] = of.p;
            dp[0][n][e] = of.ds;
          }
        }
        if (mode == kTaint) to_factor(of_p, s[0]);
        else to_factor_of_kept(of_p, s[0], kept);
        to_factor(of_ds, dp[0]);
        __syncthreads();
        if (mode != kUsual) {
          sanitize_tile<kBytesQ>(sQ, mode);
          sanitize_tile<kBytesO>(sO, mode);
        }
        if constexpr (kShare) {
          store_shared(shared_address(sP), of_p, part);
          store_shared(shared_address(sS), of_ds, part);
        }
        writes_to_async();
        __syncthreads();
        if constexpr (kShare) {
          results.add(results.dv, along_rows(shared_address(sP)), turned_o);
          results.add(results.dk, along_rows(shared_address(sS)), turned_q);
        } else {
          results.add(results.dv, of_p, turned_o);
          results.add(results.dk, of_ds, turned_q);
        }
        products_wait<0>();
        settle(results.dv);
        settle(results.dk);
        __syncthreads();
      }
      const bool odd = __syncthreads_or(results.odd());
      if (mode == kUsual && odd) continue;
      results.write(p, work, part, sK, sV, mode);
      if (mode == kUsual || mode == kTaint) break;
    }
  }
}
