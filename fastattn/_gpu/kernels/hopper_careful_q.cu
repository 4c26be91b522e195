// dQ on Hopper, the careful way: what hopper_backward_q.cu computes, in the same arithmetic and to
// the same bits, one thing after the other and loaded by ordinary loads.
//
// Tiles whose flag is set, which did not all end finite, are computed again in the modes kClean and
// kTaint of backward_q.cu. Without flags, for arrays that tensor maps cannot take, all tiles are
// computed here, first in the usual mode.

static_assert(kThreads == 128 * kGroups, "");

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_careful_q(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char shared[];
  char* const sQ = shared;
  char* const sO = sQ + kBytesQ;
  char* const sK = sO + kBytesO;
  char* const sV = sK + kBytesK;
  char* const added = sV + kBytesV + (threadIdx.x >> 5) * (kBytesAdded / kReaders);  // of the warp
  const i64 total = p.tiles * p.Hq * p.batch;
  constexpr int kFlags = 4 * kGroups;
  if (p.flags && !any_flagged<kFlags>(p, total)) return;

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const u64 of_q = along_rows(shared_address(sQ) + (warp >> 2) * 64 * 128);
  const u64 of_o = along_rows(shared_address(sO) + (warp >> 2) * 64 * 128);
  const u64 of_k = along_rows(shared_address(sK)), of_v = along_rows(shared_address(sV));
  const u64 turned_k = along_columns<kBc>(shared_address(sK));
#pragma unroll 1
  for (i64 index = blockIdx.x; index < total; index += gridDim.x) {
    if (p.flags && !flagged<kFlags>(p, index)) continue;
    const Work work = work_of(p, index);
    const int b = work.b, h = work.h, kv_head = h / (int)p.group,
              i = work.row0 + warp * 16 + (lane >> 2);
    const int q_rows = entry_of(p, b).q_len - work.row0, kv_len = entry_of(p, b).kv_len;
    Rows rows;
    rows.load(p, work, i);

#pragma unroll 1
    for (int mode = p.flags ? kClean : kUsual;; mode = mode == kUsual ? kClean : kTaint) {
      float dq[kO][4];
      clear(dq);
      __syncthreads();
      load_tile_carefully<kBr, kD>(sQ, p.q, p.q.at(b, h) + work.row0 * p.q.row, q_rows, (int)p.D,
                                   kUsual);
      load_tile_carefully<kBr, kDv>(sO, p.dout, p.dout.at(b, h) + work.row0 * p.dout.row, q_rows,
                                    (int)p.Dv, kUsual);
#pragma unroll 1
      for (Step step = seek(p, work, work.from); step.n < work.to;
           step = seek(p, work, step.n + 1)) {
        const int j = step.n * kBc;
        float s[1][kN][4], dp[1][kN][4];
        u32 factor[kN / 2][4];
        load_tile_carefully<kBc, kD>(sK, p.k, p.k.at(b, kv_head) + j * p.k.row, kv_len - j,
                                     (int)p.D, kUsual);
        load_tile_carefully<kBc, kDv>(sV, p.v, p.v.at(b, kv_head) + j * p.v.row, kv_len - j,
                                      (int)p.Dv, kUsual);
        const bool adds = asks_added(step.needs);
        if (adds) bring_added<16>(p, added, work, work.row0 + warp * 16, step.n);
        writes_to_async();
        __syncthreads();
        start_product<kD, kBr, kBc>(s[0], of_q, of_k);
        start_product<kDv, kBr, kBc>(dp[0], of_o, of_v);
        products_wait<0>();
        settle(s[0]);
        settle(dp[0]);
        const RowOf row_of = {work.row0 + warp * 16, h};
        Kept<1, kN> kept;
        if constexpr (has(kDropout)) kept = draw<false, 1, kN>(p, b, j, PlaceOf<false>(), row_of);
        if constexpr (kGeneral)
          apply_factors(p, s, dp, true, kept, [&](int, int, int e) { return rows.delta[e >> 1]; });
        apply_added(p, b, s, row_of, step, added, mode);
        exclude(p, b, s, i, j, adds ? added : nullptr, lane >> 2);
#pragma unroll
        for (int y = 0; y < kN; y++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            dp[0][y][e] = gradient<true>(p, s[0][y][e], dp[0][y][e], rows.lse[e >> 1],
                                         rows.delta[e >> 1], mode).ds;
        to_factor(factor, dp[0]);
        __syncthreads();
        if (mode != kUsual) {
          sanitize_tile<kBytesK>(sK, mode);
          writes_to_async();
          __syncthreads();
        }
        add_product(dq, factor, turned_k);
        products_wait<0>();
        settle(dq);
        __syncthreads();
      }
      const bool odd = __syncthreads_or(finish(dq, rows));
      if (mode == kUsual && odd) continue;
      write_rows(p, work, dq, sQ, mode);
      if (mode == kUsual || mode == kTaint) break;
    }
  }
}
