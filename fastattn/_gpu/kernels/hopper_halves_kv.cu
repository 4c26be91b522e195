// dK = scale dS^T Q and dV = P^T dO of float32 on Hopper: what hopper_backward_kv.cu computes, of
// the halves that hopper_split.cu has made.
//
//     loader:      K, V, then Q and dO block by block with their rows' numbers, each into one of
//                  kStages buffers, as it gets free
//     warpgroup:   S^T = K Q^T, dP^T = V dO^T, P^T = exp(S^T - lse), dS^T = P^T (dP^T - delta),
//                  dV += P^T dO, dK += dS^T Q
//
// A warp whose results do not all end finite sets its flag, for hopper_careful_halves_kv.cu.

constexpr int kStages = 2;
constexpr int kBuffers = kBytesK + kBytesV + kStages * (kBytesQ + kBytesO);
constexpr int kBytesWeights = 4 * 3 * (kBc + kStages * kBr);
constexpr int kBytesNumbers = 2 * kStages * kBytesRows;

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_halves_kv(const __grid_constant__ Params p, const __grid_constant__ TensorMap map_q,
                 const __grid_constant__ TensorMap map_o, const __grid_constant__ TensorMap map_k,
                 const __grid_constant__ TensorMap map_v) {
  extern __shared__ __align__(1024) char shared[];
  float* const lse_rows = (float*)(shared + kBuffers);
  float* const delta_rows = lse_rows + kStages * kBr;
  float* const weights_k = delta_rows + kStages * kBr;
  float* const weights_v = weights_k + kBc;  // and spreads
  float* const weights_q = weights_v + 2 * kBc;
  float* const weights_o = weights_q + kStages * kBr;  // and spreads
  const u32 sK = shared_address(shared), sV = sK + kBytesK, sQ = sV + kBytesV,
            sO = sQ + kStages * kBytesQ;
  const u32 k_full = sK + kBuffers + kBytesNumbers + kBytesWeights, v_full = k_full + 8;
  const u32 q_full = v_full + 8, q_free = q_full + 8 * kStages;
  const u32 o_full = q_free + 8 * kStages, o_free = o_full + 8 * kStages;
  if (threadIdx.x == 0) {
    barrier_init(k_full, 2);  // a tile and its rows' weights,
    barrier_init(v_full, 3);  // or spreads besides
    for (int x = 0; x < kStages; x++) {
      barrier_init(q_full + 8 * x, 3);  // and lse
      barrier_init(q_free + 8 * x, kReaders);
      barrier_init(o_full + 8 * x, 4);  // and delta
      barrier_init(o_free + 8 * x, kReaders);
    }
    barriers_ready();
  }
  __syncthreads();
  const Work work = work_of(p, blockIdx.x);
  const int steps = steps_of(p, work);

  // The computing warps come first, so that warps count as in hopper_careful_halves_kv.cu.
  if (threadIdx.x >= 128 * kGroups) {
    registers_down<kLoaders>();
    if (threadIdx.x != 128 * kGroups || steps <= 0) return;
    const Numbers of_k(p, kSplitK, work.b, work.kv_head), of_v(p, kSplitV, work.b, work.kv_head);
    load_map<kBc, kD>(sK, map_k, k_full, work.key0, work.kv_head, work.b);
    of_k.load<kBc, false>(weights_k, work.key0, k_full);
    Step step = first_step(p, work);
#pragma unroll 1
    for (int x = 0; x < steps; x++, step.next(work)) {
      const int stage = x % kStages, free = (x / kStages & 1) ^ 1, row0 = step.n * kBr;
      const u32 q_there = q_full + 8 * stage, o_there = o_full + 8 * stage;
      const i64 row = row_start(p, work.b, step.h) + row0;
      const Numbers of_q(p, kSplitQ, work.b, step.h), of_o(p, kSplitO, work.b, step.h);
      barrier_wait(q_free + 8 * stage, free);
      load_map<kBr, kD>(sQ + stage * kBytesQ, map_q, q_there, row0, step.h, work.b);
      of_q.load<kBr, false>(weights_q + stage * kBr, row0, q_there);
      load_bytes(shared_address(lse_rows + stage * kBr), (const float*)p.row_lse + row, kBytesRows,
                 q_there);
      if (x == 0) {
        load_map<kBc, kDv>(sV, map_v, v_full, work.key0, work.kv_head, work.b);
        of_v.load<kBc, true>(weights_v, work.key0, v_full);
      }
      barrier_wait(o_free + 8 * stage, free);
      load_map<kBr, kDv>(sO + stage * kBytesO, map_o, o_there, row0, step.h, work.b);
      of_o.load<kBr, true>(weights_o + stage * 2 * kBr, row0, o_there);
      load_bytes(shared_address(delta_rows + stage * kBr), (const float*)p.row_delta + row,
                 kBytesRows, o_there);
    }
    return;
  }

  registers_up<kComputers>();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp >> 2;
  const u64 of_k = along_rows(sK + group * 64 * 128), of_v = along_rows(sV + group * 64 * 128);
  const u64 of_q = along_rows(sQ), of_o = along_rows(sO);
  const u64 turned_q = along_columns<kBr>(sQ), turned_o = along_columns<kBr>(sO);
  const int r = warp * 16 + (lane >> 2), j = work.key0 + r;
  float dk[1][kO][4], dv[1][kO][4];
  Earlier<1, kO> earlier_dk, earlier_dv;
  clear(dk);
  clear(dv);
  clear(earlier_dk);
  clear(earlier_dv);
  if (steps > 0) {
    Sides sides;
    barrier_wait(k_full, 0);
    barrier_wait(v_full, 0);
    sides.load<kBc>(weights_k + r, weights_v + r, (float)p.scale);
    const float unit[2] = {sides.score[0] * (float)p.scale, sides.score[1] * (float)p.scale};
    Step step = first_step(p, work);
#pragma unroll 1
    for (int x = 0; x < steps; x++, step.next(work)) {
      const int stage = x % kStages, full = x / kStages & 1;
      if (x > 0 && begins_part(work, step)) {
        end_part<false>(earlier_dk, dk, kOnes);
        end_part<false>(earlier_dv, dv, kOnes);
      }
      const float* const of_rows = weights_q + stage * kBr;
      const float* const of_gradients = weights_o + stage * 2 * kBr;
      const u64 rows_q = of_q + (stage * kBytesQ >> 4), rows_o = of_o + (stage * kBytesO >> 4);
      Product<kBc, kBr> scores, gradients;
      Factor factor;
      float s[1][kN][4], dp[1][kN][4];
      barrier_wait(q_full + 8 * stage, full);
      scores.make(s, of_k, rows_q);
      barrier_wait(o_full + 8 * stage, full);
      gradients.start<0>(of_v, rows_o);
      weigh_columns(s[0], of_rows);
      sides.keep_scores(s[0], of_rows);
#pragma unroll
      for (int n = 0; n < kN; n++) {
        const Pair lse = pair_of(lse_rows + stage * kBr, n);
#pragma unroll
        for (int e = 0; e < 4; e++) s[0][n][e] = fma_of(s[0][n][e], unit[e >> 1], -lse.x[e & 1]);
      }
      if (work.cut(step.n)) exclude(p, work.b, s, j, step.n * kBr);
      for_each(s, [&](float& y, int, int, int) { y = exp_of(y); });
      products_wait<0>();
      gradients.take<0>(dp);
      gradients.finish(dp, of_v, rows_o);
      weigh_columns(dp[0], of_gradients);
      sides.keep_gradients(dp[0], of_gradients + kBr);
#pragma unroll
      for (int n = 0; n < kN; n++) {
        const Pair delta = pair_of(delta_rows + stage * kBr, n);
#pragma unroll
        for (int e = 0; e < 4; e++)
          dp[0][n][e] =
              s[0][n][e] * fma_of(dp[0][n][e], sides.gradient[e >> 1], -delta.x[e & 1]);
      }
      factor.take(s[0], of_gradients);
      add_product<kBr>(dv, factor, turned_o + (stage * kBytesO >> 4));
      factor.take(dp[0], of_rows);
      __syncwarp();  // all lanes have read the rows' numbers
      if (lane == 0) barrier_arrive(o_free + 8 * stage);
      add_product<kBr>(dk, factor, turned_q + (stage * kBytesQ >> 4));
      if (lane == 0) barrier_arrive(q_free + 8 * stage);
    }
    add_earlier<false>(dk, earlier_dk, kOnes);
    add_earlier<false>(dv, earlier_dv, kOnes);
    named_sync(1, 128 * kGroups);  // all have read K and V
  }
  const bool odd = __any_sync(~0u, !all_finite(dk[0]) || !all_finite(dv[0]));
  if (lane == 0) ((u8*)p.flags)[(i64)blockIdx.x * 4 * kGroups + warp] = odd;
  auto row_of = [&](const Array& array) {
    return [&](int r) -> char* {
      return work.key0 + r < p.Lk ? array.at(work.b, work.kv_head) + (work.key0 + r) * array.row
                                  : nullptr;
    };
  };
  write_results(dk, p.scale, shared, p.dk, (int)p.D, kUsual, row_of(p.dk));
  write_results(dv, 1, shared, p.dv, (int)p.Dv, kUsual, row_of(p.dv));
}
