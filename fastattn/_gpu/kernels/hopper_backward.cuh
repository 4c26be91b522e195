// What Hopper's backward kernels share: hopper_backward_q.cu and hopper_backward_kv.cu, which are
// fast, hopper_backward_qkv.cu with hopper_finish_q.cu, which are faster and not deterministic, and
// hopper_careful_q.cu and hopper_careful_kv.cu, which follow them as hopper_careful.cu does the
// forward.

// Blocks of the grid stay, and take tile after tile from a counter, so that a tile's first loads
// run beside the end of the one before. The loading thread hands a tile's number on to kReaders
// warps, through two slots in turn; -1 is the end.
template <int kReaders>
struct Queue {
  int* slots;
  u32 full, free;  // barriers, two of each

  static constexpr int kBytes = 2 * 2 * 8;  // of the barriers

  DEVICE Queue(int* of_slots, u32 barriers)
      : slots(of_slots), full(barriers), free(barriers + 16) {}
  DEVICE void init() const {
    for (int x = 0; x < 2; x++) {
      barrier_init(full + 8 * x, 1);
      barrier_init(free + 8 * x, kReaders);
    }
  }
  // By the loading thread: the turn's tile, which may be beyond the last of `total`.
  DEVICE bool hand_on(int turn, int index, int total) const {
    barrier_wait(free + 8 * (turn & 1), (turn >> 1 & 1) ^ 1);
    slots[turn & 1] = index < total ? index : -1;
    barrier_arrive(full + 8 * (turn & 1));
    return index < total;
  }
  DEVICE static int next(const Params& p, int total) {
    return p.next ? (int)gridDim.x + atomicAdd((int*)p.next, 1) : total;
  }
  // By a warp that computes.
  DEVICE int take(int turn) const {
    barrier_wait(full + 8 * (turn & 1), turn >> 1 & 1);
    const int index = __shfl_sync(~0u, slots[turn & 1], 0);
    if ((threadIdx.x & 31) == 0) barrier_arrive(free + 8 * (turn & 1));
    return index;
  }
};

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

// P of a pair: in gradient.cuh's usual arithmetic, for the fast kernels.
DEVICE float probable(float s, float log2_unit, float lse) {
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
