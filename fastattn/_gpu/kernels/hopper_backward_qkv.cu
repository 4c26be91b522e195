// dQ = scale dS K, dK = scale dS^T Q and dV = P^T dO on Hopper in one walk: what
// hopper_backward_kv.cu computes, and with the dS it has, each block's share of dQ, which is added
// to sums in memory in whatever order blocks come. Five products for each pair instead of seven,
// and dQ's last bits differ from run to run.
//
//     loader:      K, V, then Q and dO block by block with their rows' lse and delta, each into one
//                  of kStages buffers, as it gets free
//     warpgroup:   S^T = K Q^T, dP^T = V dO^T, P^T = exp(S^T - lse), dS^T = P^T (dP^T - delta),
//                  dV += P^T dO, its part of dS K, dK += dS^T Q
//
// dS^T goes through shared memory: dQ's sum is over the keys of both warpgroups. Of dS K a
// warpgroup makes 64 rows by 64 columns, which it stages in the order of its registers and has
// added by the copy engine (see RowSums). hopper_finish_q.cu makes dQ of the sums.
//
// Blocks stay (see Queue). A warp whose dK or dV do not all end finite sets its flag, for
// hopper_careful_kv.cu.

static_assert(!kShare && !kGeneral && kGroups * 64 * 64 == kBr * panels_of(kD) * kPanel,
              "a warpgroup's part of dS K");
constexpr bool kRowsApart = kBr == 128;  // warpgroups make other rows of dS K, or other columns
constexpr int kStages = 2;
constexpr int kBytesS = tile_bytes(kBc, kBr), kBytesSums = 64 * 64 * 4;
constexpr int kBytesStage = kBytesQ + kBytesO + 2 * kBytesRows;
constexpr int kBuffers = kBytesK + kBytesV + kStages * kBytesStage + 2 * (kBytesS + kBytesSums);
static_assert(kBytesK + kBytesV <= 2 * (kBytesS + kBytesSums), "");

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_backward_qkv(const __grid_constant__ Params p, const __grid_constant__ TensorMap map_q,
                    const __grid_constant__ TensorMap map_o,
                    const __grid_constant__ TensorMap map_k,
                    const __grid_constant__ TensorMap map_v) {
  extern __shared__ __align__(1024) char shared[];
  const u32 sK = shared_address(shared), sV = sK + kBytesK, sQ = sV + kBytesV,
            sO = sQ + kStages * kBytesQ;
  const u32 sS = sO + kStages * kBytesO, sSums = sS + 2 * kBytesS,
            sLse = sSums + kGroups * kBytesSums, sDelta = sLse + kStages * kBytesRows;
  char* const rest = shared + kBuffers;
  const Queue<kReaders> queue(rest);
  const Loader<kStages, false> loader(sK, sQ, sLse, rest + queue.kBytes);
  if (threadIdx.x == 0) {
    queue.init();
    loader.init();
    barriers_ready();
  }
  __syncthreads();

  // The computing warps come first, so that warps count as in hopper_careful_kv.cu.
  if (threadIdx.x >= 128 * kGroups) {
    registers_down<kLoaders>();
    if (threadIdx.x == 128 * kGroups) loader.load(p, queue, map_q, map_o, map_k, map_v);
    return;
  }

  registers_up<kComputers>();
  const int warp = warp_number(), lane = threadIdx.x & 31, group = warp >> 2;
  const Part part(group);
  const u64 of_k = along_rows(sK + part.key * 128), of_v = along_rows(sV + part.key * 128);
  const u64 of_q = along_rows(sQ), of_o = along_rows(sO);
  const u64 turned_q = along_columns<kBr>(sQ), turned_o = along_columns<kBr>(sO);
  const u64 turned_s = along_columns<kBc>(sS + kRowsApart * group * kBc * 128);
  const u64 turned_k = along_columns<kBc>(sK + !kRowsApart * group * kBc * 128);
  const float* const lse_rows = (const float*)(shared + (sLse - sK));
  const float* const delta_rows = (const float*)(shared + (sDelta - sK));
  const u32 staged = sSums + group * kBytesSums;
  float4* const own_sums = (float4*)(shared + (staged - sK)) + threadIdx.x % 128;
  const float log2_unit = (float)(p.scale * kLog2e);
  const bool adds = threadIdx.x % 128 == 0;  // the thread that has a warpgroup's sums added
  int tiles = 0, done = 0;                   // and steps
  for (int turn = 0;; turn++) {
    const int index = queue.take(turn).index;
    if (index < 0) return;
    const Work work = work_of(p, index);
    const int steps = steps_of(p, work), end = done + max_of(steps, 0);
    const int j = work.key0 + part.key + warp % 4 * 16 + (lane >> 2);
    Results results;
    results.clear();
    if (steps > 0) {
      barrier_wait(loader.k_full, tiles & 1);
      barrier_wait(loader.v_full, tiles & 1);
      Step step = first_step(p, work);
#pragma unroll 1
      for (; done < end; done++, step.next(work)) {
        const int stage = done % kStages, full = done / kStages & 1;
        float s[1][kN][4], dp[kN][4];
        u32 of_p[kN / 2][4], of_ds[kN / 2][4];
        barrier_wait(loader.q_full + 8 * stage, full);
        start_product<kD, kBc, kBr>(s[0], of_k, of_q + (stage * kBytesQ >> 4));
        barrier_wait(loader.o_full + 8 * stage, full);
        start_product<kDv, kBc, kBr>(dp, of_v, of_o + (stage * kBytesO >> 4));
        products_wait<1>();
        settle(s[0]);
        if (work.cut(step.n)) exclude(p, work.b, s, j, step.n * kBr);
        to_probabilities(p, s[0], lse_rows + stage * kBr, log2_unit);
        to_factor(of_p, s[0]);
        products_wait<0>();
        settle(dp);
        to_gradients(dp, s[0], delta_rows + stage * kBr);
        to_factor(of_ds, dp);
        results.add(results.dv, of_p, turned_o + (stage * kBytesO >> 4));
        // Two buffers: whoever is here has finished the step before the last, and so have all.
        store_shared(sS + (done & 1) * kBytesS, of_ds, part);
        writes_to_async();
        if (adds) adds_read();
        named_sync(1, 128 * kGroups);
        float sums[8][4];
        products_fence();
#pragma unroll
        for (int k = 0; k < kBc / 16; k++)
          wgmma<true, true>(sums, turned_s + ((done & 1) * kBytesS >> 4) + column_step(k),
                            turned_k + column_step(k), k > 0);
        products_commit();
        results.add(results.dk, of_ds, turned_q + (stage * kBytesQ >> 4));
        products_wait<1>();
        settle(sums);
#pragma unroll
        for (int n = 0; n < 8; n++)
          own_sums[n * 128] = make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
        writes_to_async();
        named_sync(2 + group, 128);
        if (adds) {
          const int row = step.n * kBr + kRowsApart * group * 64, chunk0 = !kRowsApart * group * 8;
          const int chunks = min_of((int)p.D / 8 - chunk0, 8);
          if (row < p.Lq && chunks > 0)
            add_bytes(RowSums(p).at(work.b, step.h, row / 64, chunk0), staged,
                      chunks * RowSums::kBytesChunk);
        }
        products_wait<0>();
        settle(results.dk);
        settle(results.dv);
        if (lane == 0) {
          barrier_arrive(loader.q_free + 8 * stage);
          barrier_arrive(loader.o_free + 8 * stage);
        }
      }
      if (adds) adds_read();
      if (lane == 0) barrier_arrive(loader.kv_free);
      tiles++;
    }
    // Results pass through the buffers of dS and of sums, of which all have made their last use.
    named_sync(1, 128 * kGroups);
    const bool odd = __any_sync(~0u, results.odd());
    if (lane == 0) ((u8*)p.flags)[(i64)index * 4 * kGroups + warp] = odd;
    results.write(p, work, part, shared + (sS - sK), shared + (sS - sK) + kBytesK, kUsual);
    named_sync(1, 128 * kGroups);
  }
}
