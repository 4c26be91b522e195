// dQ = scale dS K on Hopper: what backward_q.cu computes, by a warp that loads and two warpgroups
// that compute, each 64 query rows.
//
//     loader:      Q, dO, then K and V block by block, each into a buffer, as it gets free
//     warpgroup:   S = Q K^T, dP = dO V^T, P = exp(S - lse), dS = P (dP - delta), dQ += dS K
//
// Blocks stay (see Queue). A warp whose rows do not all end finite sets its flag, for
// hopper_careful_q.cu.

constexpr int kStagesK = 2, kStagesV = 2 - (kD > 128);
constexpr int kBuffers = kBytesQ + kBytesO + kStagesK * kBytesK + kStagesV * kBytesV;
constexpr int kBytesResults = kBytesQ;
constexpr int kStagesAdded = kD <= 64 ? 2 : 1;
constexpr int kBytesBrought = kStagesAdded * kBytesAdded, kBytesRest = 256 + kBytesBrought;
constexpr bool kApart = kBuffers + kBytesResults + kBytesRest <= 227 * 1024;  // dQ has its own room,
constexpr int kAtResults = kApart ? kBuffers : 0;                             // else that of Q
// Whether the last product of a block runs on beside the first of the next: where there are
// registers.
constexpr bool kRunsOn = kBc * 5 / 4 + kD / 2 <= 208;

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_backward_q(const __grid_constant__ Params p, const __grid_constant__ TensorMap map_q,
                  const __grid_constant__ TensorMap map_o, const __grid_constant__ TensorMap map_k,
                  const __grid_constant__ TensorMap map_v) {
  extern __shared__ __align__(1024) char shared[];
  const u32 sQ = shared_address(shared), sO = sQ + kBytesQ, sK = sO + kBytesO,
            sV = sK + kStagesK * kBytesK;
  char* const rest = shared + kBuffers + kApart * kBytesResults;
  const Queue<kReaders + kAdders> queue(rest);
  Step* const steps = (Step*)(rest + queue.kBytes);  // of the blocks in K's buffers
  const u32 q_full = shared_address(steps + (kAdds ? kStagesK : 0)), q_free = q_full + 8,
            o_full = q_free + 8, o_free = o_full + 8;
  const u32 k_full = o_free + 8, k_free = k_full + 8 * kStagesK;
  const u32 v_full = k_free + 8 * kStagesK, v_free = v_full + 8 * kStagesV;
  const u32 step_full = v_free + 8 * kStagesV;
  const Brought<kGroups, kStagesAdded, kBytesAdded, kBytesAdded / kGroups> brought(
      rest + 256, step_full + 8 * kStagesK);
  if (threadIdx.x == 0) {
    queue.init();
    barrier_init(q_full, 1);
    barrier_init(q_free, kReaders);
    barrier_init(o_full, 1);
    barrier_init(o_free, kReaders);
    for (int x = 0; x < kStagesK; x++) {
      barrier_init(k_full + 8 * x, 1);
      barrier_init(k_free + 8 * x, kReaders + kAdders);
      if (kAdds) barrier_init(step_full + 8 * x, 1);
    }
    for (int x = 0; x < kStagesV; x++) {
      barrier_init(v_full + 8 * x, 1);
      barrier_init(v_free + 8 * x, kReaders);
    }
    if (kAdds) brought.init();
    barriers_ready();
  }
  __syncthreads();

  // The computing warps come first, so that warps count as in hopper_careful_q.cu.
  if (threadIdx.x >= 128 * kGroups) {
    registers_down<kLoaders>();
    const int other = (int)threadIdx.x - 128 * kGroups;
    if (kAdds && other >= 32) {
      const int group = other / 32 - 1;
      if (group < kGroups)
        bring_all<kStagesK>(
            queue, brought, steps, step_full, k_free, group,
            [&](int index) { return work_of(p, index); },
            [&](char* to, const Work& work, const Step& step) {
              bring_added<64>(p, to, work, work.row0 + group * 64, step.n);
            });
      return;
    }
    if (other >= kSeekers) return;
    const int total = (int)(p.tiles * p.Hq * p.batch);
    int tiles = 0, others = 0, keys = 0, values = 0;  // Q, dO, K, V loaded so far
    for (int turn = 0, index = blockIdx.x;; turn++) {
      Work work = {};
      Step step = {};
      if (index < total) {
        work = work_of(p, index);
        step = seek(p, work, work.from);
      }
      const bool any = step.n < work.to;
      if (!queue.hand_on(turn, index, total, any)) break;
      const int kv_head = work.h / (int)p.group;
      auto load_k = [&](const Step& step) {
        const int stage = keys % kStagesK;
        barrier_wait(k_free + 8 * stage, (keys / kStagesK & 1) ^ 1);
        if (leads()) {
          if (kAdds) {
            steps[stage] = step;
            barrier_arrive(step_full + 8 * stage);
          }
          load_map<kBc, kD>(sK + stage * kBytesK, map_k, k_full + 8 * stage, step.n * kBc, kv_head,
                            work.b);
        }
        keys++;
      };
      auto load_v = [&](int n) {
        const int stage = values % kStagesV;
        barrier_wait(v_free + 8 * stage, (values / kStagesV & 1) ^ 1);
        if (leads())
          load_map<kBc, kDv>(sV + stage * kBytesV, map_v, v_full + 8 * stage, n * kBc, kv_head,
                             work.b);
        values++;
      };
      auto seek_after = [&](Step& step) {
        const Step next = seek(p, work, step.n + 1);
        step.last = next.n >= work.to;
        return next;
      };
      if (!kApart && !any) {  // results of zeros take the place of Q
        barrier_wait(q_free, (tiles & 1) ^ 1);
        if (leads()) barrier_arrive(q_full);
        tiles++;
      }
      if (any) {
        Step next = seek_after(step);
        load_k(step);
        barrier_wait(q_free, (tiles & 1) ^ 1);
        if (leads()) load_map<kBr, kD>(sQ, map_q, q_full, work.row0, work.h, work.b);
        barrier_wait(o_free, (others & 1) ^ 1);
        if (leads()) load_map<kBr, kDv>(sO, map_o, o_full, work.row0, work.h, work.b);
        tiles++;
        others++;
        load_v(step.n);
#pragma unroll 1
        while (!step.last) {
          step = next;
          next = seek_after(step);
          load_k(step);
          load_v(step.n);
        }
      }
      index = queue.next(p, total);
    }
    return;
  }

  registers_up<kComputers>();
  const int warp = warp_number(), lane = threadIdx.x & 31, group = warp >> 2;
  const u64 of_q = along_rows(sQ + group * 64 * 128), of_o = along_rows(sO + group * 64 * 128);
  const u64 of_k = along_rows(sK), of_v = along_rows(sV), turned_k = along_columns<kBc>(sK);
  const float log2_unit = (float)(p.scale * kLog2e);
  int tiles = 0, others = 0, blocks = 0, taken = 0;  // Q, dO, K and V, what is brought, so far
  const int pitch = numbers_pitch(p);
  for (int turn = 0;; turn++) {
    const auto [index, some] = queue.take(turn);
    if (index < 0) return;
    const Work work = work_of(p, index);
    const int i = work.row0 + warp * 16 + (lane >> 2);
    const RowOf row_of = {work.row0 + warp * 16, work.h};
    float dq[kO][4];
    Rows rows;
    clear(dq);
    rows.load(p, work, i);
    const bool any = kAdds ? some : work.from < work.to, has_q = any || !kApart;
    if (has_q) barrier_wait(q_full, tiles & 1);
    if (any) {
      barrier_wait(o_full, others & 1);
#pragma unroll 1
      for (int n = work.from, first = blocks; n < work.to; blocks++) {
        const int at_k = blocks % kStagesK, at_v = blocks % kStagesV;
        float s[1][kN][4], dp[1][kN][4];
        u32 factor[kN / 2][4];
        barrier_wait(k_full + 8 * at_k, blocks / kStagesK & 1);
        const Step step = kAdds ? steps[at_k] : Step{n, 0, false};
        if (kAdds) __syncwarp();  // before a lane gives the buffer back
        start_product<kD, kBr, kBc>(s[0], of_q, of_k + (at_k * kBytesK >> 4));
        barrier_wait(v_full + 8 * at_v, blocks / kStagesV & 1);
        start_product<kDv, kBr, kBc>(dp[0], of_o, of_v + (at_v * kBytesV >> 4));
        Kept<1, kN> kept;
        if constexpr (has(kDropout))  // while registers are free
          kept = draw<false, 1, kN>(p, work.b, step.n * kBc, PlaceOf<false>(), row_of);
        products_wait<1>();
        settle(s[0]);
        if (kRunsOn) {
          settle(dq);
          if (blocks > first && lane == 0) barrier_arrive(k_free + 8 * ((blocks - 1) % kStagesK));
        }
        auto to_probabilities = [&] {
          const bool adds = asks_added(step.needs), cut = work.cut(step.n);
          char* const added = adds ? brought.wait(group, taken) : nullptr;
          char* const of_warp = added + (warp & 3) * 16 * pitch;
          apply_added(p, work.b, s, row_of, step, of_warp, kUsual);
          if (cut || (kBits && adds))
            exclude(p, work.b, s, i, step.n * kBc, added, (warp & 3) * 16 + (lane >> 2), cut);
          if (adds) brought.release(group, taken++);
#pragma unroll
          for (int x = 0; x < kN; x++)
#pragma unroll
            for (int e = 0; e < 4; e++)
              s[0][x][e] = probable(p, s[0][x][e], log2_unit, rows.lse[e >> 1]);
        };
        if (!has(kSoftcap)) to_probabilities();
        products_wait<0>();
        settle(dp[0]);
        if (lane == 0) barrier_arrive(v_free + 8 * at_v);
        if constexpr (kFactors)
          apply_factors_by_parts(p, s, dp, kept, [&](int, int, int e) { return rows.delta[e >> 1]; });
        if (has(kSoftcap)) to_probabilities();
#pragma unroll
        for (int x = 0; x < kN; x++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            dp[0][x][e] = s[0][x][e] * (kFactors ? dp[0][x][e] : dp[0][x][e] - rows.delta[e >> 1]);
        n = step.last ? work.to : step.n + 1;
        to_factor(factor, dp[0]);
        add_product(dq, factor, turned_k + (at_k * kBytesK >> 4));
        if (!kRunsOn) {
          products_wait<0>();
          settle(dq);
          if (lane == 0) barrier_arrive(k_free + 8 * at_k);
        }
      }
      if (lane == 0) {
        barrier_arrive(o_free);
        if (kApart) barrier_arrive(q_free);
      }
      others++;
      products_wait<0>();
      settle(dq);
      if (kRunsOn && lane == 0) barrier_arrive(k_free + 8 * ((blocks - 1) % kStagesK));
      if (!kApart) named_sync(1 + group, 128);  // all have read Q
    }
    const bool odd = __any_sync(~0u, finish(dq, rows));
    if (lane == 0) ((u8*)p.flags)[(i64)index * 4 * kGroups + warp] = odd;
    write_rows(p, work, dq, shared + kAtResults, kUsual);
    if (!kApart) {
      writes_to_async();
      __syncwarp();
      if (lane == 0) barrier_arrive(q_free);
    }
    if (has_q) tiles++;
  }
}
