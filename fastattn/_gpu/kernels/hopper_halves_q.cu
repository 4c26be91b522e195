// dQ = scale dS K of float32 on Hopper: what hopper_backward_q.cu computes, of the halves that
// hopper_split.cu has made.
//
//     loader:      Q, dO, then K and V block by block with their rows' weights and spreads, each
//                  into a buffer, as it gets free
//     warpgroup:   S = Q K^T, dP = dO V^T, P = exp(S - lse), dS = P (dP - delta), dQ += dS K
//
// A warp whose rows do not all end finite sets its flag, for hopper_careful_halves_q.cu.

constexpr int kStages = 2;
constexpr int kBuffers = kBytesQ + kBytesO + kStages * (kBytesK + kBytesV);
constexpr int kBytesWeights = 4 * 3 * (kBr + kStages * kBc);

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_halves_q(const __grid_constant__ Params p, const __grid_constant__ TensorMap map_q,
                const __grid_constant__ TensorMap map_o, const __grid_constant__ TensorMap map_k,
                const __grid_constant__ TensorMap map_v) {
  extern __shared__ __align__(1024) char shared[];
  float* const weights_q = (float*)(shared + kBuffers);
  float* const weights_o = weights_q + kBr;  // and spreads
  float* const weights_k = weights_o + 2 * kBr;
  float* const weights_v = weights_k + kStages * kBc;  // and spreads
  const u32 sQ = shared_address(shared), sO = sQ + kBytesQ, sK = sO + kBytesO,
            sV = sK + kStages * kBytesK;
  const u32 q_full = sQ + kBuffers + kBytesWeights, o_full = q_full + 8;
  const u32 k_full = o_full + 8, k_free = k_full + 8 * kStages;
  const u32 v_full = k_free + 8 * kStages, v_free = v_full + 8 * kStages;
  if (threadIdx.x == 0) {
    barrier_init(q_full, 2);  // a tile and its rows' weights,
    barrier_init(o_full, 3);  // or spreads besides
    for (int x = 0; x < kStages; x++) {
      barrier_init(k_full + 8 * x, 2);
      barrier_init(k_free + 8 * x, kReaders);
      barrier_init(v_full + 8 * x, 3);
      barrier_init(v_free + 8 * x, kReaders);
    }
    barriers_ready();
  }
  __syncthreads();
  const Work work = work_of(p, blockIdx.x);
  const int blocks = work.to - work.from;

  // The computing warps come first, so that warps count as in hopper_careful_halves_q.cu.
  if (threadIdx.x >= 128 * kGroups) {
    registers_down<kLoaders>();
    if (threadIdx.x != 128 * kGroups || blocks <= 0) return;
    const int kv_head = work.h / (int)p.group;
    const Numbers of_q(p, kSplitQ, work.b, work.h), of_o(p, kSplitO, work.b, work.h);
    const Numbers of_k(p, kSplitK, work.b, kv_head), of_v(p, kSplitV, work.b, kv_head);
    auto load_k = [&](int x) {
      const int stage = x % kStages, j = (work.from + x) * kBc;
      barrier_wait(k_free + 8 * stage, (x / kStages & 1) ^ 1);
      load_map<kBc, kD>(sK + stage * kBytesK, map_k, k_full + 8 * stage, j, kv_head, work.b);
      of_k.load<kBc, false>(weights_k + stage * kBc, j, k_full + 8 * stage);
    };
    auto load_v = [&](int x) {
      const int stage = x % kStages, j = (work.from + x) * kBc;
      barrier_wait(v_free + 8 * stage, (x / kStages & 1) ^ 1);
      load_map<kBc, kDv>(sV + stage * kBytesV, map_v, v_full + 8 * stage, j, kv_head, work.b);
      of_v.load<kBc, true>(weights_v + stage * 2 * kBc, j, v_full + 8 * stage);
    };
    load_k(0);
    load_map<kBr, kD>(sQ, map_q, q_full, work.row0, work.h, work.b);
    of_q.load<kBr, false>(weights_q, work.row0, q_full);
    load_v(0);
    load_map<kBr, kDv>(sO, map_o, o_full, work.row0, work.h, work.b);
    of_o.load<kBr, true>(weights_o, work.row0, o_full);
#pragma unroll 1
    for (int x = 1; x < blocks; x++) {
      load_k(x);
      load_v(x);
    }
    return;
  }

  registers_up<kComputers>();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp >> 2;
  const u64 of_q = along_rows(sQ + group * 64 * 128), of_o = along_rows(sO + group * 64 * 128);
  const u64 of_k = along_rows(sK), of_v = along_rows(sV), turned_k = along_columns<kBc>(sK);
  const int r = warp * 16 + (lane >> 2), i = work.row0 + r;
  float dq[1][kO][4];
  Earlier<1, kO> earlier;
  Rows rows;
  clear(dq);
  clear(earlier);
  rows.load(p, work, i);
  if (blocks > 0) {
    Sides sides;
    barrier_wait(q_full, 0);
    barrier_wait(o_full, 0);
    sides.load<kBr>(weights_q + r, weights_o + r, (float)p.scale);
    const float unit[2] = {sides.score[0] * (float)p.scale, sides.score[1] * (float)p.scale};
#pragma unroll 1
    for (int x = 0; x < blocks; x++) {
      const int n = work.from + x, stage = x % kStages, full = x / kStages & 1;
      if (x > 0 && n % (kRowsOfPart / kBc) == 0) end_part<false>(earlier, dq, kOnes);
      const float* const of_keys = weights_k + stage * kBc;
      const float* const of_values = weights_v + stage * 2 * kBc;
      const u64 keys = of_k + (stage * kBytesK >> 4), values = of_v + (stage * kBytesV >> 4);
      Product<kBr, kBc> scores, gradients;
      Factor factor;
      float s[1][kN][4], dp[1][kN][4];
      barrier_wait(k_full + 8 * stage, full);
      scores.start<0>(of_q, keys);
      barrier_wait(v_full + 8 * stage, full);
      gradients.start<0>(of_o, values);
      products_wait<1>();
      scores.take<0>(s);
      if constexpr (kBatches == 2) {
        scores.start<1>(of_q, keys);
        products_wait<1>();
        gradients.take<0>(dp);
        gradients.start<1>(of_o, values);
        products_wait<1>();
        scores.take<1>(s);
      }
      weigh_columns(s[0], of_keys);
      sides.keep_scores(s[0], of_keys);
      for_each(s, [&](float& y, int, int, int e) {
        y = fma_of(y, unit[e >> 1], -rows.lse[e >> 1]);
      });
      if (work.cut(n)) exclude(p, work.b, s, i, n * kBc);
      for_each(s, [&](float& y, int, int, int) { y = exp_of(y); });
      products_wait<0>();
      gradients.take<kBatches - 1>(dp);
      weigh_columns(dp[0], of_values);
      sides.keep_gradients(dp[0], of_values + kBc);
      for_each(dp, [&](float& y, int m, int z, int e) {
        y = s[m][z][e] * fma_of(y, sides.gradient[e >> 1], -rows.delta[e >> 1]);
      });
      factor.take(dp[0], of_keys);
      __syncwarp();  // all lanes have read the weights
      if (lane == 0) barrier_arrive(v_free + 8 * stage);
      add_product<kBc>(dq, factor, turned_k + (stage * kBytesK >> 4));
      if (lane == 0) barrier_arrive(k_free + 8 * stage);
    }
    add_earlier<false>(dq, earlier, kOnes);
    named_sync(1, 128 * kGroups);  // all have read Q and dO
  }
  const bool odd = __any_sync(~0u, finish(dq[0], rows));
  if (lane == 0) ((u8*)p.flags)[(i64)blockIdx.x * 4 * kGroups + warp] = odd;
  write_results(dq, p.scale, shared, p.dq, (int)p.D, kUsual, [&](int r) -> char* {
    return work.row0 + r < p.Lq ? p.dq.at(work.b, work.h) + (work.row0 + r) * p.dq.row : nullptr;
  });
}
