// What Hopper's backward kernels share: hopper_backward_q.cu and hopper_backward_kv.cu, which are
// fast, hopper_backward_qkv.cu with hopper_finish_q.cu, which are faster and not deterministic, and
// hopper_careful_q.cu and hopper_careful_kv.cu, which follow them as hopper_careful.cu does the
// forward.

// With masks or segments the loader skips tiles of scores that these leave nothing of, and tells the
// others what each of the rest asks for. For each warpgroup that computes, another warp of the
// loader's brings that (hopper_added.cuh).
constexpr bool kBits = has(kBools) || has(kSegments);
constexpr bool kFactors = kGeneral && !kBits;  // options of which dS knows more than scores
constexpr int kMoved = kAdds && kD <= 128 ? 8 : 0;  // registers
constexpr int kComputers = 240 - kMoved, kLoaders = 24 + 2 * kMoved;
constexpr int kLanes = 1;  // of a warp, that arrive for it
// Where some tiles are skipped, all lanes of the loading warp look for the next; the first loads.
constexpr int kSeekers = kAdds ? 32 : 1;
DEVICE bool leads() { return kSeekers == 1 || (threadIdx.x & 31) == 0; }

// The first of tiles n .. end - 1 that is not empty, and what it asks for; `end` or beyond is none.
// needs(n) is that of a tile.
struct Found { int n, needs; };
template <class NeedsOf>
DEVICE Found first_of(int n, int end, NeedsOf needs_of_tile) {
  Found found = {n, 0};
  if constexpr (kAdds) {
    const int lane = threadIdx.x & 31;
    for (; found.n < end; found.n += 32) {
      const int needs = found.n + lane < end ? needs_of_tile(found.n + lane) : kEmpty;
      const u32 some = __ballot_sync(~0u, !(needs & kEmpty));
      if (!some) continue;
      const int at = __ffs(some) - 1;
      return {found.n + at, __shfl_sync(~0u, needs, at)};
    }
  }
  return found;
}

// Blocks of the grid stay, and take tile after tile from a counter, so that a tile's first loads
// run beside the end of the one before. The loading thread hands a tile's number on to kReaders
// warps, and whether there is any step for it, through two slots in turn; -1 is the end.
struct Taken { int index; bool any; };

template <int kReaders>
struct Queue {
  int2* slots;
  u32 full, free;  // barriers, two of each

  static constexpr int kBytes = 2 * 8 + 2 * 2 * 8;

  DEVICE explicit Queue(char* at)
      : slots((int2*)at), full(shared_address(slots + 2)), free(full + 16) {}
  DEVICE void init() const {
    for (int x = 0; x < 2; x++) {
      barrier_init(full + 8 * x, 1);
      barrier_init(free + 8 * x, kReaders);
    }
  }
  // By the loading thread: the turn's tile, which may be beyond the last of `total`.
  DEVICE bool hand_on(int turn, int index, int total, bool any) const {
    barrier_wait(free + 8 * (turn & 1), (turn >> 1 & 1) ^ 1);
    if (leads()) {
      slots[turn & 1] = make_int2(index < total ? index : -1, any);
      barrier_arrive(full + 8 * (turn & 1));
    }
    return index < total;
  }
  DEVICE static int next(const Params& p, int total) {
    int index = total;
    if (p.next && leads()) index = (int)gridDim.x + atomicAdd((int*)p.next, 1);
    return kSeekers == 1 ? index : __shfl_sync(~0u, index, 0);
  }
  // By another warp.
  DEVICE Taken take(int turn) const {
    barrier_wait(full + 8 * (turn & 1), turn >> 1 & 1);
    const int2 slot = slots[turn & 1];
    const int index = __shfl_sync(~0u, slot.x, 0);
    const bool any = kAdds && slot.y;
    if (kAdds) __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(free + 8 * (turn & 1));
    return {index, any};
  }
};

// What warps bring, in kSlots slots in turn: each of kBytes, in which that for a warpgroup follows
// kBytesGroup after that for the one before.
template <int kGroups, int kSlots, int kBytes, int kBytesGroup>
struct Brought {
  char* slots;
  u32 full, free;  // barriers, kSlots of each for each warpgroup

  static constexpr int kBarriers = 2 * kGroups * kSlots * 8;  // bytes

  DEVICE Brought(char* to, u32 barriers)
      : slots(to), full(barriers), free(barriers + kBarriers / 2) {}
  DEVICE void init() const {
    for (int x = 0; x < kGroups * kSlots; x++) {
      barrier_init(full + 8 * x, kLanes);
      barrier_init(free + 8 * x, 4 * kLanes);
    }
  }
  DEVICE char* at(int group, int turn) const {
    return slots + turn % kSlots * kBytes + group * kBytesGroup;
  }
  DEVICE u32 barrier(u32 of, int group, int turn) const {
    return of + 8 * (group * kSlots + turn % kSlots);
  }
  // By the warp that brings it, and by those that take it.
  template <class Bring>
  DEVICE void put(int group, int turn, Bring bring) const {
    barrier_wait(barrier(free, group, turn), (turn / kSlots & 1) ^ 1);
    bring(at(group, turn));
    if ((threadIdx.x & 31) == 0) barrier_arrive(barrier(full, group, turn));
  }
  DEVICE char* wait(int group, int turn) const {
    barrier_wait(barrier(full, group, turn), turn / kSlots & 1);
    return at(group, turn);
  }
  DEVICE void release(int group, int turn) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(barrier(free, group, turn));
  }
};

// A warp that brings: for each tile of the queue, what its steps ask for. The loader writes a step
// for each of kStages buffers.
template <int kStages, class Step, class OfQueue, class OfBrought, class WorkOf, class Bring>
DEVICE void bring_all(const OfQueue& queue, const OfBrought& brought, const Step* steps, u32 full,
                      u32 free, int group, WorkOf work_of_tile, Bring bring) {
  int done = 0, count = 0;
  for (int turn = 0;; turn++) {
    const Taken taken = queue.take(turn);
    if (taken.index < 0) return;
    const auto work = work_of_tile(taken.index);
    for (bool more = taken.any; more; done++) {
      const int stage = done % kStages;
      barrier_wait(full + 8 * stage, done / kStages & 1);
      const Step step = steps[stage];
      __syncwarp();
      if ((threadIdx.x & 31) == 0) barrier_arrive(free + 8 * stage);
      more = !step.last;
      if (asks_added(step.needs))
        brought.put(group, count++, [&](char* to) { bring(to, work, step); });
    }
  }
}

// c = A B^T over all columns of two tiles, a batch of products.
template <int kColumns, int kRowsA, int kRowsB, int N>
DEVICE void start_product(float (&c)[N][4], u64 a, u64 b) {
  products_fence();
  multiply_along_rows<0, kColumns / 16, kRowsA, kRowsB>(c, a, b, 0);
  products_commit();
}

// Take what is not finite out of a tile, or (kTaint) leave 1 where it was and 0 elsewhere.
template <int kBytes>
DEVICE void sanitize_tile(char* tile, int mode) {
#pragma unroll 1
  for (int x = threadIdx.x; x < kBytes / 2; x += kThreads) sanitize(((Elem*)tile)[x], mode);
}

// Results of a warp, 16 rows from r0 on and N * 8 columns from chunk0 on, rounded into a tile.
template <int kRows, int N>
DEVICE void round_to_tile(u32 tile, const float (&c)[N][4], float factor, int r0, int chunk0) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < N; n += 2)
    store_blocks(chunk_at<kRows>(tile, r0 + (lane & 15), chunk0 + n + (lane >> 4)),
                 pack(Tile(), c[n][0] * factor, c[n][1] * factor),
                 pack(Tile(), c[n][2] * factor, c[n][3] * factor),
                 pack(Tile(), c[n + 1][0] * factor, c[n + 1][1] * factor),
                 pack(Tile(), c[n + 1][2] * factor, c[n + 1][3] * factor));
}

// From there to an array, whose row r0 is `to`: `rows` rows, and the columns below `width`.
template <int kRows, int N>
DEVICE void write_tile(const char* tile, const Array& array, char* to, int rows, int width, int r0,
                       int chunk0, int mode) {
  const int lane = threadIdx.x & 31;
  if (array.access == kVectors && mode != kTaint) {
    write_16_rows<kRows, N>(tile, r0, chunk0, to, array.row, rows, width);
  } else {
#pragma unroll 1
    for (int x = lane; x < 16 * N * 8; x += 32) {
      const int r = x / (N * 8), c = chunk0 * 8 + x % (N * 8);
      if (r < rows && c < width) {
        const Elem y = *(const Elem*)(tile + chunk_at<kRows>(0, r0 + r, c >> 3) + (c & 7) * 2);
        write<Elem>(to + r * array.row + c * array.column, widen(y), array.access, mode);
      }
    }
  }
}

template <int N>
DEVICE void clear(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
}

// apply_factors of the fast kernels: softcap's a few columns at a time, or registers would not do.
template <int N, class DeltaOf>
DEVICE void apply_factors_by_parts(const Params& p, float (&s)[1][N][4], float (&dp)[1][N][4],
                                   const Kept<1, N>& kept, DeltaOf delta) {
  if constexpr (has(kSoftcap)) {
    constexpr int kPart = 4;
#pragma unroll
    for (int n0 = 0; n0 < N; n0 += kPart) {
      float part[1][kPart][4], of_part[1][kPart][4];
#pragma unroll
      for (int n = 0; n < kPart; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          part[0][n][e] = s[0][n0 + n][e];
          of_part[0][n][e] = dp[0][n0 + n][e];
        }
      apply_factors(p, part, of_part, true, kept,
                    [&](int m, int n, int e) { return delta(m, n0 + n, e); });
#pragma unroll
      for (int n = 0; n < kPart; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          s[0][n0 + n][e] = part[0][n][e];
          dp[0][n0 + n][e] = of_part[0][n][e];
        }
    }
  } else {
    apply_factors(p, s, dp, true, kept, delta);
  }
}

// What there is for a tile of scores; a row of kBc columns has so many bytes of bits or numbers.
constexpr int kBytesAdded = kAdds * (kBits ? kBr * kBc / 8 : kBr * (kBc + 8) * 2);

// P of a pair: in gradient.cuh's usual arithmetic, for the fast kernels.
DEVICE float probable(const Params& p, float s, float log2_unit, float lse) {
  if (in_natural_units(p)) return exp_of(s - lse);
  return exp2_of(fma_of(s, log2_unit, -lse * (float)kLog2e));
}

// Sums of dS K in float, 64 rows of a head at a time, as a warpgroup's registers have them: a chunk
// is 8 columns, of which each thread has a block of four numbers.
struct RowSums {
  static constexpr int kBytesChunk = 64 * 8 * 4;
  const Params& p;

  DEVICE explicit RowSums(const Params& params) : p(params) {}
  DEVICE float* at(int b, int h, int part, int chunk) const {
    const i64 parts = (p.Lq + 63) / 64;
    const i64 index = ((b * p.Hq + h) * parts + part) * (p.D / 8) + chunk;
    return (float*)((char*)p.dq_sums + index * kBytesChunk);
  }
};

// Whether a block that careful kernels know by `index` is to be computed again: kEach flags of
// warps.
template <int kEach>
DEVICE bool flagged(const Params& p, i64 index) {
  bool any = false;
  for (int x = 0; x < kEach; x++) any = any || ((const u8*)p.flags)[index * kEach + x];
  return any;
}
template <int kEach>
DEVICE bool any_flagged(const Params& p, i64 total) {
  bool any = false;
  for (i64 index = blockIdx.x + (i64)threadIdx.x * gridDim.x; index < total;
       index += (i64)gridDim.x * kThreads)
    any = any || flagged<kEach>(p, index);
  return __syncthreads_or(any);
}
