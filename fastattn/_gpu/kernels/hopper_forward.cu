// Forward on Hopper (arXiv 2407.08608): a warp loads, two or three warpgroups compute, and a
// warpgroup's products run beside its softmax.
//
//     loader:      Q, then K and V block by block, each into one of kStages buffers, as it gets
//                  free
//     warpgroup:   S = Q K'^T of the next block starts, O += P V of this one starts
//                  softmax of S while O's products run; P = S; O = O x scale
//
// Blocks of the grid stay and take tile after tile from a counter, longest first under a causal
// bound, so that the loader is already at the next tile while this one is written. Only blocks that
// a bound cuts are masked. A warp whose rows do not all end finite sets its flag, for
// hopper_careful.cu.
//
// In float32 the other three warps of the loader's warpgroup split what has come into halves, where
// it lies (hopper_halves.cuh): the copy engine tells them, and they tell the warpgroups that
// compute.
//
// Blocks that a mask or segments leave nothing of are skipped by the loader, which tells the others
// what each block asks for. That is brought by other warps of the loader's warpgroup, one for each
// warpgroup that computes.

constexpr int kStages = 2;
constexpr int kSplitters = kHalves == 2 ? 3 : 0;  // warps
constexpr int kAdders = kAdds ? kGroups : 0;      // warps
constexpr int kBytesAdded = 64 * kAddedRow;
constexpr int kBytesRest = 512;  // barriers and what goes with them
constexpr int kBytesQ = tile_bytes(kBr, kD);
constexpr int kBytesK = tile_bytes(kBc, kD);
constexpr int kBytesV = tile_bytes(kBc, kDv);
constexpr int kBytesTile = tile_bytes(kBr, kDv), kBytesPassed = 4 * kGroups * kStage;
constexpr int kBytesO = kHalves == 2 ? kBytesPassed : kBytesTile;
constexpr int kBytesOfRows = 4 * (kBr + 2 * kStages * kBc);  // weights
constexpr int kBytesWeights = kHalves == 2 ? kBytesOfRows : 0;
constexpr int kBuffers = kBytesQ + kStages * (kBytesK + kBytesV);
constexpr int kMost = 227 * 1024 - kBytesRest - kBytesWeights - kAdders * kBytesAdded;
constexpr bool kApart = kBuffers + kBytesO <= kMost;  // results have room of their own,
constexpr int kAtO = kApart ? kBuffers : 0;           // else they take that of Q
constexpr int kMoved = kAdds && kDv < 256 ? 8 : 0;  // registers
constexpr int kComputers = kHalves == 2 ? 216 : (kGroups == 2 ? 240 - kMoved : 160);
constexpr int kLoaders = kHalves == 2 ? 72 : (kGroups == 2 ? 24 + 2 * kMoved : 32);

// A tile of the work, as the loader hands it on, and its first block; b = -1 is the end.
struct alignas(16) Order { int b, h, tile, index, first; };

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_forward(const __grid_constant__ Params p, const __grid_constant__ TensorMap map_q,
               const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v) {
  extern __shared__ __align__(1024) char shared[];
  const u32 sQ = shared_address(shared), sK = sQ + kBytesQ, sV = sK + kStages * kBytesK;
  char* const rest = shared + kBuffers + (kApart ? kBytesO : 0);
  Order* const orders = (Order*)rest;  // two of them, in turn
  float* const weights_q = (float*)(rest + kBytesRest);
  float* const weights_k = weights_q + kBr;  // for each of the buffers
  float* const weights_v = weights_k + kStages * kBc;
  char* const added = rest + kBytesRest + kBytesWeights;
  Step* const steps = (Step*)(orders + 2);  // of the blocks in K's buffers, where some are skipped
  const u32 barriers = shared_address(steps + kStages);
  const u32 q_full = barriers, q_free = q_full + 8, order_full = q_free + 8,
            order_free = order_full + 16;
  const u32 k_full = order_free + 16, k_free = k_full + 8 * kStages;
  const u32 v_full = k_free + 8 * kStages, v_free = v_full + 8 * kStages;
  // Over when copies are there, in float32 still to be split.
  const u32 of_splitters = v_free + 8 * kStages;
  const u32 q_there = kSplitters ? of_splitters : q_full;
  const u32 k_there = kSplitters ? of_splitters + 8 : k_full;
  const u32 v_there = kSplitters ? k_there + 8 * kStages : v_full;
  const u32 step_full = v_free + 8 * kStages;
  const u32 added_full = step_full + 8 * kStages, added_free = added_full + 8 * kGroups;
  if (threadIdx.x == 0) {
    constexpr int kLanes = 1;  // of a warp, that arrive for it
    constexpr int kReaders = 4 * kGroups * kLanes, kWriters = kSplitters ? kSplitters * kLanes : 1;
    barrier_init(q_full, kWriters);
    barrier_init(q_free, kReaders);
    for (int x = 0; x < 2; x++) {
      barrier_init(order_full + 8 * x, 1);
      barrier_init(order_free + 8 * x, kReaders + (kSplitters + kAdders) * kLanes);
    }
    for (int x = 0; x < kStages; x++) {
      barrier_init(k_full + 8 * x, kWriters);
      barrier_init(k_free + 8 * x, kReaders + kAdders * kLanes);
      barrier_init(v_full + 8 * x, kWriters);
      barrier_init(v_free + 8 * x, kReaders);
    }
    if (kSplitters) {
      barrier_init(q_there, 1);
      for (int x = 0; x < kStages; x++) {
        barrier_init(k_there + 8 * x, 1);
        barrier_init(v_there + 8 * x, 1);
      }
    }
    if (kAdders) {
      for (int x = 0; x < kStages; x++) barrier_init(step_full + 8 * x, 1);
      for (int x = 0; x < kGroups; x++) {
        barrier_init(added_full + 8 * x, kLanes);
        barrier_init(added_free + 8 * x, 4 * kLanes);
      }
    }
    barriers_ready();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    registers_down<kLoaders>();
    if (kSplitters && threadIdx.x >= 32) {
      const int warp = (threadIdx.x >> 5) - 1;
      int tiles = 0, keys = 0, values = 0;  // split so far
      auto done = [&](u32 barrier) {
        writes_to_async();
        __syncwarp();
        if ((threadIdx.x & 31) == 0) barrier_arrive(barrier);
      };
      auto split_k = [&] {
        const int stage = keys % kStages;
        barrier_wait(k_there + 8 * stage, keys / kStages & 1);
        char* const tile = shared + kBytesQ + stage * kBytesK;
        split_tile<kOfK, kBc, kD>(tile, weights_k + stage * kBc, warp, kSplitters);
        done(k_full + 8 * stage);
        keys++;
      };
      auto split_v = [&] {
        const int stage = values % kStages;
        char* const tile = shared + kBytesQ + kStages * kBytesK + stage * kBytesV;
        barrier_wait(v_there + 8 * stage, values / kStages & 1);
        split_tile<kOfV, kBc, kDv>(tile, weights_v + stage * kBc, warp, kSplitters);
        done(v_full + 8 * stage);
        values++;
      };
      for (int turn = 0;; turn++) {
        const int slot = turn & 1;
        barrier_wait(order_full + 8 * slot, turn >> 1 & 1);
        const Order order = orders[slot];
        __syncwarp();
        if ((threadIdx.x & 31) == 0) barrier_arrive(order_free + 8 * slot);
        if (order.b < 0) return;
        const Work work = work_of_tile(p, order.b, order.tile);
        if (work.empty()) continue;
        split_k();
        barrier_wait(q_there, tiles & 1);
        split_tile<kOfQ, kBr, kD>(shared, weights_q, warp, kSplitters);
        done(q_full);
        tiles++;
#pragma unroll 1
        for (int n = work.to - 2; n >= work.from; n--) {
          split_k();
          split_v();
        }
        split_v();
      }
    }
    if (kAdders && threadIdx.x >= 32) {
      const int group = (threadIdx.x >> 5) - 1, lane = threadIdx.x & 31;
      if (group >= kGroups) return;
      int keys = 0, brought = 0;  // blocks so far, and those that something was brought for
      for (int turn = 0;; turn++) {
        const int slot = turn & 1;
        barrier_wait(order_full + 8 * slot, turn >> 1 & 1);
        const Order order = orders[slot];
        __syncwarp();
        if (lane == 0) barrier_arrive(order_free + 8 * slot);
        if (order.b < 0) return;
        const Work own = work_of_group(p, order.b, order.tile, group);
        for (int n = order.first; n >= 0; keys++) {
          const int stage = keys % kStages;
          barrier_wait(step_full + 8 * stage, keys / kStages & 1);
          const Step step = steps[stage];
          __syncwarp();
          if (lane == 0) barrier_arrive(k_free + 8 * stage);
          n = step.next;
          if (!asks_added(step.needs) || !own.has(step.n)) continue;
          barrier_wait(added_free + 8 * group, (brought & 1) ^ 1);
          load_added_of<64>(p, added + group * kBytesAdded, order.b, order.h,
                            order.tile * kBr + group * 64, step.n * kBc);
          if (lane == 0) barrier_arrive(added_full + 8 * group);
          brought++;
        }
      }
    }
    if (threadIdx.x != 0) return;
    const int total = (int)(p.tiles * p.Hq * p.batch);
    int tiles = 0, keys = 0, values = 0;  // loaded so far
    for (int turn = 0, index = blockIdx.x;; turn++) {
      const int slot = turn & 1;
      barrier_wait(order_free + 8 * slot, (turn >> 1 & 1) ^ 1);
      Order order = {-1, 0, 0, index, -1};
      Work work = {};
      Step step = {};
      if (index < total) {
        const Turn next = turn_of(index, p.tiles, p.Hq * p.batch);
        order.b = (int)next.head / (int)p.Hq;
        order.h = (int)next.head % (int)p.Hq;
        order.tile = (int)p.tiles - 1 - next.tile;
        work = work_of_tile(p, order.b, order.tile);
        step = seek(p, order.b, order.h, order.tile, work.from, work.to - 1);
        if (step.n >= work.from) order.first = step.n;
      }
      orders[slot] = order;
      barrier_arrive(order_full + 8 * slot);
      if (order.b < 0) break;
      const int kv_head = order.h / (int)p.group;
      auto load_k = [&](const Step& step) {
        const int stage = keys % kStages;
        barrier_wait(k_free + 8 * stage, (keys / kStages & 1) ^ 1);
        if (kAdds) steps[stage] = step;
        if (kAdders) barrier_arrive(step_full + 8 * stage);
        load_map<kBc, kD>(sK + stage * kBytesK, map_k, k_there + 8 * stage, step.n * kBc, kv_head,
                          order.b);
        keys++;
      };
      auto load_v = [&](int n) {
        const int stage = values % kStages;
        barrier_wait(v_free + 8 * stage, (values / kStages & 1) ^ 1);
        load_map<kBc, kDv>(sV + stage * kBytesV, map_v, v_there + 8 * stage, n * kBc, kv_head,
                           order.b);
        values++;
      };
      if (order.first >= 0) {
        auto seek_after = [&](Step& step) {
          const Step next = seek(p, order.b, order.h, order.tile, work.from, step.n - 1);
          step.next = next.n >= work.from ? next.n : -1;
          return next;
        };
        Step next = seek_after(step);
        load_k(step);
        barrier_wait(q_free, (tiles & 1) ^ 1);
        load_map<kBr, kD>(sQ, map_q, q_there, work.row0, order.h, order.b);
        tiles++;
#pragma unroll 1
        while (step.next >= 0) {
          const Step after = seek_after(next);
          load_k(next);
          load_v(step.n);
          step = next;
          next = after;
        }
        load_v(step.n);
      } else if (!kApart) {  // results of zeros take the place of Q
        barrier_wait(q_free, (tiles & 1) ^ 1);
        barrier_arrive(q_there);
        tiles++;
      }
      index = p.next ? (int)gridDim.x + atomicAdd((int*)p.next, 1) : total;
    }
    return;
  }

  registers_up<kComputers>();
  // In float32 what the compiler keeps for one number of all lanes may not fit into registers.
  const int warp = (kHalves == 2 && kD > 64 ? threadIdx.x >> 5 : warp_number()) - 4;
  const int lane = threadIdx.x & 31, group = warp >> 2;
  const u64 of_q = along_rows(sQ + group * 64 * 128), of_k = along_rows(sK),
            of_v = along_columns<kBc>(sV);
  const float log2_unit = (float)(unit_of(p) * kLog2e);
  int tiles = 0, blocks = 0, brought = 0;  // so far, as above
  for (int turn = 0;; turn++) {
    const int slot = turn & 1;
    barrier_wait(order_full + 8 * slot, turn >> 1 & 1);
    const Order order = orders[slot];
    __syncwarp();
    if (lane == 0) barrier_arrive(order_free + 8 * slot);
    if (order.b < 0) return;
    const Work work = work_of_tile(p, order.b, order.tile);
    const Work own = work_of_group(p, order.b, order.tile, warp_number() / 4 - 1);
    const int i = work.row0 + warp * 16 + (lane >> 2);

    Results results;
    Rows rows;
    results.clear();
    rows.clear();
    auto wait_k = [&](int block) {
      barrier_wait(k_full + 8 * (block % kStages), block / kStages & 1);
    };
    auto wait_v = [&](int stage, int block) {
      barrier_wait(v_full + 8 * stage, block / kStages & 1);
    };
    // The block in a buffer of K that is there.
    auto step_of = [&](int stage, int n) { return kAdds ? steps[stage] : Step{n, 0, n - 1}; };
    int n = kAdds ? order.first : work.to - 1;  // the next block
    // Blocks that these rows do not see, down to `end`.
    auto pass = [&](int end) {
#pragma unroll 1
      for (; n >= end; blocks++) {
        const int stage = blocks % kStages;
        wait_k(blocks);
        n = step_of(stage, n).next;
        if (kAdds) __syncwarp();
        if (lane == 0) barrier_arrive(k_free + 8 * stage);
        wait_v(stage, blocks);
        if (lane == 0) barrier_arrive(v_free + 8 * stage);
      }
    };
    const bool has_q = !kApart || n >= work.from;
    if (has_q) barrier_wait(q_full, tiles & 1);
    pass(own.to);
    if (n < own.from) {
      pass(work.from);
      if (kApart && has_q && lane == 0) barrier_arrive(q_free);
    } else {
      Scores scores;
      Factor factor;
      Kept<1, kN> kept;
      float scale[2];
      int stage = blocks % kStages;
      const RowOf row_of = {work.row0 + warp * 16, order.h};
      const int pitch = kBits ? kAddedRow : has(kBools) ? bools_pitch(p) : numbers_pitch(p);
      char* const of_warp = added + group * kBytesAdded + (warp & 3) * 16 * pitch;
      auto draw_kept = [&](int n) {  // while registers are free
        if constexpr (has(kDropout))
          kept = draw<false, 1, kN>(p, order.b, n * kBc, PlaceOf<false>(), row_of);
      };
      // S is there: what is left of it, and its buffer is free. It becomes P.
      auto finish_s = [&](int stage, const Step& step) {
        scores.finish();
        if constexpr (kHalves == 2) {
          const float* const of_rows = weights_q + warp * 16 + (lane >> 2);
          weigh_scores(scores.s[0], of_rows, weights_k + stage * kBc, log2_unit);
        }
        if (kHalves == 2 || kAdds) __syncwarp();  // weights or the step are read
        if (lane == 0) barrier_arrive(k_free + 8 * stage);
        const bool adds = asks_added(step.needs), cut = own.cut(step.n);
        if (adds) barrier_wait(added_full + 8 * group, brought & 1);
        scores.apply(p, order.b, row_of, step, of_warp);
        if (cut || (kBits && adds))
          scores.exclude(p, order.b, i, step.n * kBc, adds ? of_warp : nullptr, cut);
        if (adds) {
          __syncwarp();
          if (lane == 0) barrier_arrive(added_free + 8 * group);
          brought++;
        }
        rows.add(p, scores, scale, log2_unit);
        if constexpr (has(kDropout)) scores.drop(kept);
      };
      wait_k(blocks);
      Step step = step_of(stage, n);
      scores.start(of_q, of_k + (stage * kBytesK >> 4));
      draw_kept(step.n);
      products_wait<0>();
      finish_s(stage, step);
      if (kHalves == 2) wait_v(stage, blocks);
      results.factor_of(factor, scores, weights_v + stage * kBc);
      if (step.next >= own.from) wait_k(blocks + 1);
#pragma unroll 1
      while (step.next >= own.from) {
        const int next = (blocks + 1) % kStages;
        step = step_of(next, step.next);
        if constexpr (kShares == 2) results.start<0>(factor, of_v + (stage * kBytesV >> 4));
        scores.start(of_q, of_k + (next * kBytesK >> 4));
        if constexpr (kShares == 2) {
          products_wait<1>();
          results.end<0>();
        }
        if (kHalves == 1) wait_v(stage, blocks);
        results.start<kShares - 1>(factor, of_v + (stage * kBytesV >> 4));
        draw_kept(step.n);
        products_wait<1>();
        finish_s(next, step);
        // Here, since the compiler moves a wait for products up to the branch before it, and the
        // softmax is to come before that.
        if (step.next >= own.from) wait_k(blocks + 2);
        products_wait<0>();
        results.end<kShares - 1>();
        if (lane == 0) barrier_arrive(v_free + 8 * stage);
        if (kHalves == 2) wait_v(next, blocks + 1);
        results.factor_of(factor, scores, weights_v + next * kBc);
        results.rescale(scale);
        stage = next;
        blocks++;
      }
      if (kApart && lane == 0) barrier_arrive(q_free);
      if (kHalves == 1) wait_v(stage, blocks);
      results.add(factor, of_v + (stage * kBytesV >> 4));
      if (kHalves == 2) __syncwarp();  // weights are read
      if (lane == 0) barrier_arrive(v_free + 8 * stage);
      blocks++;
      n = step.next;
      pass(work.from);
    }

    const bool odd = __any_sync(~0u, results.finish(p, rows, order.b, order.h, i, kUsual));
    if (lane == 0) ((u8*)p.flags)[(i64)order.index * 4 * kGroups + warp] = odd;
    results.write_lse(p, order.b, order.h, i, kUsual);
    const int r0 = warp * 16;
    __syncwarp();
    if (!kApart) named_sync(1 + group, 128);  // all have read Q
    if (kHalves == 2 && p.out.access == kVectors) {
      results.write_pairs(p, order.b, order.h, i);
    } else if (p.out_kind == kF32 || p.out.access != kVectors) {
      static_assert(kStage <= 16 * 128 * panels_of(kDv), "");
      float* const stage = (float*)(shared + kAtO + warp * kStage);
      results.write_out(p, order.b, order.h, work.row0 + r0, stage, kUsual);
    } else {
      // A warp's rows on their own, in whole 16 bytes.
#pragma unroll
      for (int n = 0; n < kO; n += 2)
        store_blocks(chunk_at<kBr>(sQ + kAtO, r0 + (lane & 15), n + (lane >> 4)),
                     pack(Tile(), results.o[n][0], results.o[n][1]),
                     pack(Tile(), results.o[n][2], results.o[n][3]),
                     pack(Tile(), results.o[n + 1][0], results.o[n + 1][1]),
                     pack(Tile(), results.o[n + 1][2], results.o[n + 1][3]));
      __syncwarp();
      const int i0 = work.row0 + r0;
      write_16_rows<kBr, kO>(shared + kAtO, r0, 0, p.out.at(order.b, order.h) + i0 * p.out.row,
                            p.out.row, (int)p.Lq - i0, (int)p.Dv);
    }
    if (!kApart) writes_to_async();
    __syncwarp();
    if (!kApart && lane == 0) barrier_arrive(q_free);
    if (has_q) tiles++;
  }
}
