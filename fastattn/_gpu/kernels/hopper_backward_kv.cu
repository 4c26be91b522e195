// dK = scale dS^T Q and dV = P^T dO on Hopper: what backward_kv.cu computes, by a warp that loads
// and two warpgroups that compute.
//
//     loader:      K, V, then Q and dO block by block with their rows' lse and delta, each into one
//                  of kStages buffers, as it gets free
//     warpgroup:   S^T = K Q^T, dP^T = V dO^T, P^T = exp(S^T - lse), dS^T = P^T (dP^T - delta),
//                  dV += P^T dO, dK += dS^T Q
//
// A warp whose results do not all end finite sets its flag, for hopper_careful_kv.cu.

constexpr int kStages = 2;
constexpr int kBuffers =
    kBytesK + kBytesV + kStages * (kBytesQ + kBytesO) + 2 * kBytesP + 2 * kStages * kBytesRows;
constexpr int kComputers = 240, kLoaders = 24;  // registers
// Whether the last products of a step run on beside the first of the next: where there are
// registers.
constexpr bool kRunsOn = kRowsOf + kOut <= 160;

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_backward_kv(const __grid_constant__ Params p, const __grid_constant__ TensorMap map_q,
                   const __grid_constant__ TensorMap map_o, const __grid_constant__ TensorMap map_k,
                   const __grid_constant__ TensorMap map_v) {
  extern __shared__ __align__(1024) char shared[];
  const u32 sK = shared_address(shared), sV = sK + kBytesK, sQ = sV + kBytesV,
            sO = sQ + kStages * kBytesQ;
  const u32 sP = sO + kStages * kBytesO, sS = sP + kBytesP, sLse = sS + kBytesP,
            sDelta = sLse + kStages * kBytesRows;
  const u32 k_full = sK + kBuffers, v_full = k_full + 8, q_full = v_full + 8,
            q_free = q_full + 8 * kStages;
  const u32 o_full = q_free + 8 * kStages, o_free = o_full + 8 * kStages;
  if (threadIdx.x == 0) {
    constexpr int kReaders = 4 * kGroups;  // warps
    barrier_init(k_full, 1);
    barrier_init(v_full, 1);
    for (int x = 0; x < kStages; x++) {
      barrier_init(q_full + 8 * x, 2);  // a tile and its rows' numbers
      barrier_init(q_free + 8 * x, kReaders);
      barrier_init(o_full + 8 * x, 2);
      barrier_init(o_free + 8 * x, kReaders);
    }
    barriers_ready();
  }
  __syncthreads();
  const Work work = work_of(p, blockIdx.x);
  const int steps = steps_of(p, work);

  // The computing warps come first, so that warps count as in hopper_careful_kv.cu.
  if (threadIdx.x >= 128 * kGroups) {
    registers_down<kLoaders>();
    if (threadIdx.x != 128 * kGroups || steps <= 0) return;
    load_map<kBc, kD>(sK, map_k, k_full, work.key0, work.kv_head, work.b);
    Step step = first_step(p, work);
#pragma unroll 1
    for (int x = 0; x < steps; x++, step.next(work)) {
      const int stage = x % kStages, free = (x / kStages & 1) ^ 1, row0 = step.n * kBr;
      const i64 row = row_start(p, work.b, step.h) + row0;
      barrier_wait(q_free + 8 * stage, free);
      load_map<kBr, kD>(sQ + stage * kBytesQ, map_q, q_full + 8 * stage, row0, step.h, work.b);
      load_bytes(sLse + stage * kBytesRows, (const float*)p.row_lse + row, kBytesRows,
                 q_full + 8 * stage);
      if (x == 0) load_map<kBc, kDv>(sV, map_v, v_full, work.key0, work.kv_head, work.b);
      barrier_wait(o_free + 8 * stage, free);
      load_map<kBr, kDv>(sO + stage * kBytesO, map_o, o_full + 8 * stage, row0, step.h, work.b);
      load_bytes(sDelta + stage * kBytesRows, (const float*)p.row_delta + row, kBytesRows,
                 o_full + 8 * stage);
    }
    return;
  }

  registers_up<kComputers>();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp >> 2;
  const Part part(group);
  const u64 of_k = along_rows(sK + part.key * 128), of_v = along_rows(sV + part.key * 128);
  const u64 of_q = along_rows(sQ + part.row * 128), of_o = along_rows(sO + part.row * 128);
  const u64 turned_q = along_columns<kBr>(sQ + part.panel * kBr * 128);
  const u64 turned_o = along_columns<kBr>(sO + part.panel * kBr * 128);
  const float* const lse_rows = (const float*)(shared + (sLse - sK)) + part.row;
  const float* const delta_rows = (const float*)(shared + (sDelta - sK)) + part.row;
  const float log2_unit = (float)(p.scale * kLog2e);
  const int j = work.key0 + part.key + warp % 4 * 16 + (lane >> 2);
  Results results;
  results.clear();
  if (steps > 0) {
    barrier_wait(k_full, 0);
    barrier_wait(v_full, 0);
    auto release = [&](int x) {
      const int stage = x % kStages;
      __syncwarp();  // all lanes have read the rows' numbers
      if (lane == 0) {
        barrier_arrive(q_free + 8 * stage);
        barrier_arrive(o_free + 8 * stage);
      }
    };
    Step step = first_step(p, work);
#pragma unroll 1
    for (int x = 0; x < steps; x++, step.next(work)) {
      const int stage = x % kStages, full = x / kStages & 1;
      float s[1][kN][4], dp[kN][4];
      u32 of_p[kN / 2][4], of_ds[kN / 2][4];
      barrier_wait(q_full + 8 * stage, full);
      start_product<kD, kBc, kBr>(s[0], of_k, of_q + (stage * kBytesQ >> 4));
      barrier_wait(o_full + 8 * stage, full);
      start_product<kDv, kBc, kBr>(dp, of_v, of_o + (stage * kBytesO >> 4));
      products_wait<1>();
      settle(s[0]);
      if (kRunsOn) {
        settle(results.dk);
        settle(results.dv);
        if (x > 0) release(x - 1);
      }
      if (work.cut(step.n)) exclude(p, work.b, s, j, step.n * kBr + part.row);
#pragma unroll
      for (int n = 0; n < kN; n++) {
        const Pair lse = pair_of(lse_rows + stage * kBr, n);
#pragma unroll
        for (int e = 0; e < 4; e++) s[0][n][e] = probable(s[0][n][e], log2_unit, lse.x[e & 1]);
      }
      to_factor(of_p, s[0]);
      if constexpr (kShare) {
        named_sync(1, 128 * kGroups);  // the last step's products are done
        store_shared(sP, of_p, part);
      }
      products_wait<0>();
      settle(dp);
#pragma unroll
      for (int n = 0; n < kN; n++) {
        const Pair delta = pair_of(delta_rows + stage * kBr, n);
#pragma unroll
        for (int e = 0; e < 4; e++) dp[n][e] = s[0][n][e] * (dp[n][e] - delta.x[e & 1]);
      }
      to_factor(of_ds, dp);
      const u64 rows_o = turned_o + (stage * kBytesO >> 4),
                rows_q = turned_q + (stage * kBytesQ >> 4);
      if constexpr (kShare) {
        store_shared(sS, of_ds, part);
        writes_to_async();
        named_sync(2, 128 * kGroups);
        results.add(results.dv, along_rows(sP), rows_o);
        results.add(results.dk, along_rows(sS), rows_q);
      } else {
        results.add(results.dv, of_p, rows_o);
        results.add(results.dk, of_ds, rows_q);
      }
      if (!kRunsOn) {
        products_wait<0>();
        settle(results.dk);
        settle(results.dv);
        release(x);
      }
    }
    products_wait<0>();
    settle(results.dk);
    settle(results.dv);
    named_sync(3 + (kShare ? 0 : group), kShare ? 128 * kGroups : 128);  // all have read K and V
  }
  const bool odd = __any_sync(~0u, results.odd());
  if (lane == 0) ((u8*)p.flags)[(i64)blockIdx.x * 4 * kGroups + warp] = odd;
  results.write(p, work, part, shared, shared + kBytesK, kUsual);
}
