// dK = scale dS^T Q and dV = P^T dO on Hopper: what backward_kv.cu computes, by a warp that loads
// and two warpgroups that compute.
//
//     loader:      K, V, then Q and dO block by block with their rows' lse and delta, each into one
//                  of kStages buffers, as it gets free
//     warpgroup:   S^T = K Q^T, dP^T = V dO^T, P^T = exp(S^T - lse), dS^T = P^T (dP^T - delta),
//                  dV += P^T dO, dK += dS^T Q
//
// Blocks stay (see Queue). A warp whose results do not all end finite sets its flag, for
// hopper_careful_kv.cu.

constexpr int kStages = 2;
constexpr int kBuffers =
    kBytesK + kBytesV + kStages * (kBytesQ + kBytesO) + 2 * kBytesP + 2 * kStages * kBytesRows;
constexpr int kBytesResults = kBytesK + kBytesV;
constexpr int kStagesAdded = kBits || kD <= 64 ? 2 : 1;
constexpr int kBytesBrought = kStagesAdded * kBytesAdded, kBytesRest = 256 + kBytesBrought;
constexpr bool kApart = kBuffers + kBytesResults + kBytesRest <= 227 * 1024;  // have their own room,
constexpr int kAtResults = kApart ? kBuffers : 0;                             // else that of K, V
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
  char* const rest = shared + kBuffers + kApart * kBytesResults;
  const Queue<kReaders + kAdders> queue(rest);
  const Loader<kStages, !kApart> loader(sK, sQ, sLse, rest + queue.kBytes);
  constexpr int kBytesGroup = kShare ? kBytesAdded / kGroups : added_before(64);
  const Brought<kGroups, kStagesAdded, kBytesAdded, kBytesGroup> brought(
      rest + 256, shared_address(rest) + queue.kBytes + loader.kBytes);
  if (threadIdx.x == 0) {
    queue.init();
    loader.init();
    if (kAdds) brought.init();
    barriers_ready();
  }
  __syncthreads();

  // The computing warps come first, so that warps count as in hopper_careful_kv.cu.
  if (threadIdx.x >= 128 * kGroups) {
    registers_down<kLoaders>();
    const int other = (int)threadIdx.x - 128 * kGroups;
    if (other < kSeekers) loader.load(p, queue, map_q, map_o, map_k, map_v);
    if (kAdds && other >= 32 && other < 32 + 32 * kGroups) {
      const int group = other / 32 - 1;
      const Part part(group);
      bring_all<kStages>(
          queue, brought, loader.steps, loader.step_full, loader.q_free, group,
          [&](int index) { return work_of(p, index); },
          [&](char* to, const Work& work, const Step& step) {
            bring_added<64>(p, to, work.b, step.h, step.n * kBr + part.row, work.key0 + part.key);
          });
    }
    return;
  }

  registers_up<kComputers>();
  const int warp = warp_number(), lane = threadIdx.x & 31, group = warp >> 2;
  const Part part(group);
  const u64 of_k = along_rows(sK + part.key * 128), of_v = along_rows(sV + part.key * 128);
  const u64 of_q = along_rows(sQ + part.row * 128), of_o = along_rows(sO + part.row * 128);
  const u64 turned_q = along_columns<kBr>(sQ + part.panel * kBr * 128);
  const u64 turned_o = along_columns<kBr>(sO + part.panel * kBr * 128);
  const float* const lse_rows = (const float*)(shared + (sLse - sK)) + part.row;
  const float* const delta_rows = (const float*)(shared + (sDelta - sK)) + part.row;
  const float log2_unit = (float)(p.scale * kLog2e);
  auto release = [&](int step) {
    const int stage = step % kStages;
    __syncwarp();  // all lanes have read the rows' numbers
    if (lane == 0) {
      barrier_arrive(loader.q_free + 8 * stage);
      barrier_arrive(loader.o_free + 8 * stage);
    }
  };
  int tiles = 0, done = 0, taken = 0;  // and steps, and what is brought
  for (int turn = 0;; turn++) {
    const auto [index, some] = queue.take(turn);
    if (index < 0) return;
    const Work work = work_of(p, index);
    const int steps = kAdds ? some : steps_of(p, work), end = done + max_of(steps, 0);
    const int j0 = work.key0 + part.key + warp % 4 * 16, j = j0 + (lane >> 2);
    Results results;
    results.clear();
    const bool has_kv = steps > 0 || !kApart;
    if (has_kv) {
      barrier_wait(loader.k_full, tiles & 1);
      barrier_wait(loader.v_full, tiles & 1);
      tiles++;
    }
    if (steps > 0) {
      Step step = first_step(p, work);
#pragma unroll 1
      for (bool first = true, more = true; more; done++, first = false) {
        const int stage = done % kStages, full = done / kStages & 1;
        float s[1][kN][4], dp[1][kN][4];
        u32 of_p[kN / 2][4], of_ds[kN / 2][4];
        barrier_wait(loader.q_full + 8 * stage, full);
        if (kAdds) step = loader.steps[stage];
        start_product<kD, kBc, kBr>(s[0], of_k, of_q + (stage * kBytesQ >> 4));
        barrier_wait(loader.o_full + 8 * stage, full);
        start_product<kDv, kBc, kBr>(dp[0], of_v, of_o + (stage * kBytesO >> 4));
        const RowOf row_of = {step.n * kBr + part.row, step.h};
        Kept<1, kN> kept;
        if constexpr (has(kDropout))  // while registers are free
          kept = draw<true, 1, kN>(p, work.b, j0, PlaceOf<true>(), row_of);
        products_wait<1>();
        settle(s[0]);
        if (kRunsOn) {
          settle(results.dk);
          settle(results.dv);
          if (!first) release(done - 1);
        }
        auto make_p = [&] {
          const bool adds = asks_added(step.needs), cut = work.cut(step.n);
          char* const added = adds ? brought.wait(group, taken) : nullptr;
          apply_added(p, work.b, s, row_of, step.needs, j0, added + added_before(warp % 4 * 16),
                      kUsual);
          if (cut || (kBits && adds))
            exclude(p, work.b, s, j, step.n * kBr + part.row, added, warp % 4 * 16 + (lane >> 2),
                    cut);
          if (adds) brought.release(group, taken++);
          to_probabilities(p, s[0], lse_rows + stage * kBr, log2_unit);
          to_factor_of_kept(of_p, s[0], kept);
          if constexpr (kShare) {
            named_sync(1, 128 * kGroups);  // the last step's products are done
            store_shared(sP, of_p, part);
          }
        };
        if (!has(kSoftcap)) make_p();
        products_wait<0>();
        settle(dp[0]);
        if constexpr (kFactors)
          apply_factors_by_parts(p, s, dp, kept, [&](int, int n, int e) {
            return pair_of(delta_rows + stage * kBr, n).x[e & 1];
          });
        if (has(kSoftcap)) make_p();
        more = kAdds ? !step.last : done + 1 < end;
        if (!kAdds) step.next(work);
        to_gradients(dp[0], s[0], delta_rows + stage * kBr);
        to_factor(of_ds, dp[0]);
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
          release(done);
        }
      }
      if (kApart && lane == 0) barrier_arrive(loader.kv_free);
      products_wait<0>();
      settle(results.dk);
      settle(results.dv);
      if (kRunsOn) release(done - 1);
      if (!kApart) named_sync(3 + (kShare ? 0 : group), kShare ? 128 * kGroups : 128);
    }
    const bool odd = __any_sync(~0u, results.odd());
    if (lane == 0) ((u8*)p.flags)[(i64)index * 4 * kGroups + warp] = odd;
    char* const tile_k = shared + kAtResults;
    results.write(p, work, part, tile_k, tile_k + kBytesK, kUsual);
    if (!kApart) {
      writes_to_async();
      __syncwarp();
      if (lane == 0) barrier_arrive(loader.kv_free);
    }
  }
}
