// Forward on Hopper (arXiv 2407.08608): a warp loads, two or three warpgroups compute, and a
// warpgroup's products run beside its softmax.
//
//     loader:      Q, then K and V block by block, each into one of kStages buffers, as it gets free
//     warpgroup:   S = Q K'^T of the next block starts, O += P V of this one starts
//                  softmax of S while O's products run; P = S; O = O x scale
//
// Blocks of the grid stay and take tile after tile from a counter, longest first under a causal
// bound, so that the loader is already at the next tile while this one is written. Only blocks that a
// bound cuts are masked. A warp whose rows do not all end finite sets its flag, for hopper_careful.cu.

constexpr int kStages = 2;
constexpr int kBytesQ = tile_bytes(kBr, kD);
constexpr int kBytesK = tile_bytes(kBc, kD);
constexpr int kBytesV = tile_bytes(kBc, kDv);
constexpr int kBytesO = tile_bytes(kBr, kDv);
constexpr int kBuffers = kBytesQ + kStages * (kBytesK + kBytesV);
constexpr int kMost = 227 * 1024 - 256;
constexpr bool kApart = kBuffers + kBytesO <= kMost;  // results have room of their own,
constexpr int kAtO = kApart ? kBuffers : 0;           // else they take that of Q
constexpr int kComputers = kGroups == 2 ? 240 : 160, kLoaders = kGroups == 2 ? 24 : 32;  // registers

// A tile of the work, as the loader hands it on; b = -1 is the end.
struct alignas(16) Order { int b, h, tile, index; };

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_forward(const __grid_constant__ Params p, const __grid_constant__ TensorMap map_q,
               const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v) {
  extern __shared__ __align__(1024) char shared[];
  const u32 sQ = shared_address(shared), sK = sQ + kBytesQ, sV = sK + kStages * kBytesK;
  char* const rest = shared + kBuffers + (kApart ? kBytesO : 0);
  Order* const orders = (Order*)rest;  // two of them, in turn
  const u32 barriers = shared_address(rest) + 2 * sizeof(Order);
  const u32 q_full = barriers, q_free = q_full + 8, order_full = q_free + 8, order_free = order_full + 16;
  const u32 k_full = order_free + 16, k_free = k_full + 8 * kStages;
  const u32 v_full = k_free + 8 * kStages, v_free = v_full + 8 * kStages;
  if (threadIdx.x == 0) {
    constexpr int kReaders = 4 * kGroups;  // warps
    barrier_init(q_full, 1);
    barrier_init(q_free, kReaders);
    for (int x = 0; x < 2; x++) {
      barrier_init(order_full + 8 * x, 1);
      barrier_init(order_free + 8 * x, kReaders);
    }
    for (int x = 0; x < kStages; x++) {
      barrier_init(k_full + 8 * x, 1);
      barrier_init(k_free + 8 * x, kReaders);
      barrier_init(v_full + 8 * x, 1);
      barrier_init(v_free + 8 * x, kReaders);
    }
    barriers_ready();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    registers_down<kLoaders>();
    if (threadIdx.x != 0) return;
    const int total = (int)(p.tiles * p.Hq * p.batch);
    int tiles = 0, keys = 0, values = 0;  // loaded so far
    for (int turn = 0, index = blockIdx.x;; turn++) {
      const int slot = turn & 1;
      barrier_wait(order_free + 8 * slot, (turn >> 1 & 1) ^ 1);
      Order order = {-1, 0, 0, index};
      if (index < total) {
        const Turn next = turn_of(index, p.tiles, p.Hq * p.batch);
        order.b = (int)next.head / (int)p.Hq;
        order.h = (int)next.head % (int)p.Hq;
        order.tile = (int)p.tiles - 1 - next.tile;
      }
      orders[slot] = order;
      barrier_arrive(order_full + 8 * slot);
      if (order.b < 0) break;
      const Work work = work_of(p, order.b, order.tile);
      const int kv_head = order.h / (int)p.group;
      auto load_k = [&](int n) {
        const int stage = keys % kStages;
        barrier_wait(k_free + 8 * stage, (keys / kStages & 1) ^ 1);
        load_map<kBc, kD>(sK + stage * kBytesK, map_k, k_full + 8 * stage, n * kBc, kv_head, order.b);
        keys++;
      };
      auto load_v = [&](int n) {
        const int stage = values % kStages;
        barrier_wait(v_free + 8 * stage, (values / kStages & 1) ^ 1);
        load_map<kBc, kDv>(sV + stage * kBytesV, map_v, v_full + 8 * stage, n * kBc, kv_head, order.b);
        values++;
      };
      if (work.from < work.to) {
        load_k(work.to - 1);
        barrier_wait(q_free, (tiles & 1) ^ 1);
        load_map<kBr, kD>(sQ, map_q, q_full, work.row0, order.h, order.b);
        tiles++;
#pragma unroll 1
        for (int n = work.to - 2; n >= work.from; n--) {
          load_k(n);
          load_v(n + 1);
        }
        load_v(work.from);
      }
      index = p.next ? (int)gridDim.x + atomicAdd((int*)p.next, 1) : total;
    }
    return;
  }

  registers_up<kComputers>();
  const int warp = (threadIdx.x >> 5) - 4, lane = threadIdx.x & 31, group = warp >> 2;
  const u64 of_q = along_rows(sQ + group * 64 * 128), of_k = along_rows(sK), of_v = along_columns<kBc>(sV);
  const float log2_unit = (float)(p.scale * kLog2e);
  int tiles = 0, blocks = 0;  // done so far
  for (int turn = 0;; turn++) {
    const int slot = turn & 1;
    barrier_wait(order_full + 8 * slot, turn >> 1 & 1);
    const Order order = orders[slot];
    __syncwarp();
    if (lane == 0) barrier_arrive(order_free + 8 * slot);
    if (order.b < 0) return;
    const Work work = work_of(p, order.b, order.tile);
    const int i = work.row0 + warp * 16 + (lane >> 2);

    Results results;
    Rows rows;
    results.clear();
    rows.clear();
    if (work.from < work.to) {
      Scores scores;
      u32 factor[kN / 2][4];
      float scale[2];
      int n = work.to - 1, stage = blocks % kStages;
      auto wait_k = [&](int block) { barrier_wait(k_full + 8 * (block % kStages), block / kStages & 1); };
      barrier_wait(q_full, tiles & 1);
      wait_k(blocks);
      scores.start(of_q, of_k + (stage * kBytesK >> 4));
      products_wait<0>();
      scores.finish();
      if (lane == 0) barrier_arrive(k_free + 8 * stage);
      if (work.cut(n)) scores.exclude(p, order.b, i, n * kBc);
      rows.add(scores, scale, log2_unit);
      to_factor(factor, scores.s[0]);
      if (n > work.from) wait_k(blocks + 1);
#pragma unroll 1
      while (--n >= work.from) {
        const int next = (blocks + 1) % kStages;
        scores.start(of_q, of_k + (next * kBytesK >> 4));
        barrier_wait(v_full + 8 * stage, blocks / kStages & 1);
        results.start(factor, of_v + (stage * kBytesV >> 4));
        products_wait<1>();
        scores.finish();
        if (lane == 0) barrier_arrive(k_free + 8 * next);
        if (work.cut(n)) scores.exclude(p, order.b, i, n * kBc);
        rows.add(scores, scale, log2_unit);
        // Here, since the compiler moves a wait for products up to the branch before it, and the
        // softmax is to come before that.
        if (n > work.from) wait_k(blocks + 2);
        products_wait<0>();
        settle(results.o);
        if (lane == 0) barrier_arrive(v_free + 8 * stage);
        to_factor(factor, scores.s[0]);
        results.rescale(scale);
        stage = next;
        blocks++;
      }
      if (kApart && lane == 0) barrier_arrive(q_free);
      barrier_wait(v_full + 8 * stage, blocks / kStages & 1);
      results.start(factor, of_v + (stage * kBytesV >> 4));
      products_wait<0>();
      settle(results.o);
      if (lane == 0) barrier_arrive(v_free + 8 * stage);
      blocks++;
    }

    const bool odd = __any_sync(~0u, results.finish(p, rows, order.b, order.h, i, kUsual));
    if (lane == 0) ((u8*)p.flags)[(i64)order.index * 4 * kGroups + warp] = odd;
    results.write_lse(p, order.b, order.h, i, kUsual);
    const int r0 = warp * 16;
    __syncwarp();
    if (!kApart) named_sync(1 + group, 128);  // all have read Q
    if (p.out_kind == kF32 || p.out.access != kVectors) {
      static_assert(kStage <= 16 * 128 * panels_of(kDv), "");
      float* const stage = (float*)(shared + kAtO + warp * kStage);
      results.write_out(p, order.b, order.h, work.row0 + r0, stage, kUsual);
    } else {
      // A warp's rows on their own, in whole 16 bytes.
#pragma unroll
      for (int n = 0; n < kO; n += 2)
        store_blocks(chunk_at<kBr>(sQ + kAtO, r0 + (lane & 15), n + (lane >> 4)),
                     pack(Elem(), results.o[n][0], results.o[n][1]), pack(Elem(), results.o[n][2], results.o[n][3]),
                     pack(Elem(), results.o[n + 1][0], results.o[n + 1][1]),
                     pack(Elem(), results.o[n + 1][2], results.o[n + 1][3]));
      __syncwarp();
      char* const to = p.out.at(order.b, order.h);
#pragma unroll 4
      for (int x = lane; x < 16 * kO; x += 32) {
        const int r = r0 + x / kO, c = x % kO;
        if (work.row0 + r < p.Lq && c * 8 < p.Dv)
          *(uint4*)(to + (work.row0 + r) * p.out.row + c * 16) = *(const uint4*)(shared + chunk_at<kBr>(kAtO, r, c));
      }
    }
    if (!kApart) writes_to_async();
    __syncwarp();
    if (!kApart && work.from < work.to && lane == 0) barrier_arrive(q_free);
    if (work.from < work.to) tiles++;
  }
}
