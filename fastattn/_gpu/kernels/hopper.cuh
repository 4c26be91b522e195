// What Hopper (sm_90a) has of its own: tensor-map copies, barriers in shared memory that count
// them, products of a warpgroup (four warps) whose factors lie in shared memory.
//
// A tile of 16-bit numbers lies in shared memory as panels of 64 columns, one behind the other, at
// a multiple of 1024 bytes:
//
//     panel 0, columns 0 .. 63          panel 1, columns 64 .. 127
//     row 0   | 8 chunks of 16 bytes |  row 0   | ...
//     row 1   | 8 chunks             |  row 1   | ...
//
// Chunk c of row r is the (c ^ r % 8)th of its row (the 128-byte swizzle), so that eight rows of a
// column of chunks are in different banks. A tile serves as it lies for sums along its rows and for
// sums along its columns (a turned factor). float32 is two numbers of 16 bits, hi and lo; a panel
// of lo follows that of hi. See hopper_halves.cuh.
//
// A result of 64 rows x N columns is float c[N / 8][4] in each thread. With warp w of the
// warpgroup, g = lane / 4, t = lane % 4, the block c[n] is, as in mma.cuh,
//     [0] (row 16 w + g, column 8 n + 2 t)   [1] (same, column + 1)   [2], [3] the same of row + 8
// and two blocks packed to 16 bits are a factor of the next product, 16 columns of it:
//     a[0] = c[n][0], c[n][1]   a[1] = c[n][2], c[n][3]   a[2], a[3] the same of c[n + 1]

struct alignas(64) TensorMap { u64 opaque[16]; };

constexpr int kPanel = 64;
constexpr int kHalves = sizeof(Elem) / 2;  // 16-bit numbers that a number is in tiles
constexpr int panels_of(int columns) { return (columns + kPanel - 1) / kPanel; }
constexpr int tile_bytes(int rows, int columns) {
  return panels_of(columns) * kHalves * rows * 128;
}

// The number of a thread's warp in its block, of which the compiler sees that all lanes have it.
DEVICE int warp_number() { return __shfl_sync(~0u, threadIdx.x >> 5, 0); }

DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Where columns 8 c .. 8 c + 7 of row r are in a tile of kRows rows.
template <int kRows>
DEVICE u32 chunk_at(u32 tile, int r, int c) {
  return tile + ((c >> 3) * kHalves * kRows + r) * 128 + (((c ^ r) & 7) << 4);
}

// ---------------------------------------------------------------- barriers

// A barrier of 8 bytes counts arrivals, and bytes that were announced and are still to come; at
// zero its phase is over. Waiting names the phase's parity, 0 for the first.
DEVICE void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals));
}
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
DEVICE void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, int parity) {
  asm volatile(
      "{.reg .pred over;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;}" :: "r"(barrier), "r"(parity) : "memory");
}

// Named barriers 1 to 15, for `threads` of a block.
DEVICE void named_sync(int name, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(name), "r"(threads) : "memory");
}

// What threads wrote to shared memory is there for copies and products of the other kind; each
// writer says so before the barrier that the others wait at.
DEVICE void writes_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A warpgroup's registers per thread, from here on.
template <int kCount>
DEVICE void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kCount)); }
template <int kCount>
DEVICE void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kCount)); }

// ---------------------------------------------------------------- copies

// A box of a map (columns, rows, heads, batch entries), 128 bytes of each row: a panel, or half of
// one in float32. What is beyond the array becomes zero.
DEVICE void load_box(u32 to, const TensorMap& map, u32 barrier, int column, int row, int head,
                     int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];"
      :: "r"(to), "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier) : "memory");
}
// A tile, by one thread; `barrier` is over when it is there.
template <int kRows, int kColumns>
DEVICE void load_map(u32 tile, const TensorMap& map, u32 barrier, int row, int head, int batch) {
  barrier_expect(barrier, tile_bytes(kRows, kColumns));
#pragma unroll
  for (int n = 0; n < panels_of(kColumns) * kHalves; n++)
    load_box(tile + n * kRows * 128, map, barrier, n * kPanel / kHalves, row, head, batch);
}

// Bytes that lie side by side in memory and in shared memory, a multiple of 16.
DEVICE void load_bytes(u32 to, const void* from, int bytes, u32 barrier) {
  barrier_expect(barrier, bytes);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Floats that lie side by side in shared memory are added to those in memory, whenever the copy
// engine gets there; a multiple of 16 bytes. The thread that starts it can wait until shared memory
// is read.
DEVICE void add_bytes(float* to, u32 from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" :: "l"(to), "r"(from), "r"(bytes) : "memory");
}
DEVICE void adds_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Without a map, by all threads: kRows rows of an array into a tile, `row` being the first; zeros
// beyond `rows` and `width`, and what is not finite as `mode` has it. A chunk is in the array or
// beyond it: D and Dv are multiples of 8.
template <int kRows, int kColumns>
DEVICE void load_tile_carefully(char* tile, const Array& array, const char* row, int rows,
                                int width, int mode) {
  constexpr int kChunks = 8 * panels_of(kColumns);
#pragma unroll 1
  for (int x = threadIdx.x; x < kRows * kChunks; x += kThreads) {
    const int r = x / kChunks, c = x % kChunks;
    union { uint4 all; Elem each[8]; } chunk;
    chunk.all = make_uint4(0, 0, 0, 0);
    if (r < rows && c * 8 < width) {
      const char* const from = row + r * array.row + c * 8 * array.column;
      if (array.access == kVectors) {
        chunk.all = *(const uint4*)from;
      } else {
#pragma unroll
        for (int e = 0; e < 8; e++)
          chunk.each[e] = load<Elem>(from + e * array.column, array.access);
      }
      if (mode != kUsual) {
#pragma unroll
        for (int e = 0; e < 8; e++) sanitize(chunk.each[e], mode);
      }
    }
    *(uint4*)(tile + chunk_at<kRows>(0, r, c)) = chunk.all;
  }
}

// Four 8 x 8 blocks of 16-bit numbers, as a factor's registers have them, to shared memory: lane l
// gives the address of row l % 8 of block l / 8.
DEVICE void store_blocks(u32 row, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// From there to memory: 16 rows of a tile from r0 on, N chunks of each from chunk0 on, as far as
// they exist; `to` is where row r0 goes.
template <int kRows, int N>
DEVICE void write_16_rows(const char* tile, int r0, int chunk0, char* to, i64 row, int rows,
                         int width) {
  const int lane = threadIdx.x & 31;
  uint4 chunks[N / 2];
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
    const int x = lane + 32 * k;
    chunks[k] = *(const uint4*)(tile + chunk_at<kRows>(0, r0 + x / N, chunk0 + x % N));
  }
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
    const int x = lane + 32 * k, r = x / N, c = chunk0 + x % N;
    if (r < rows && c * 8 < width) *(uint4*)(to + r * row + c * 16) = chunks[k];
  }
}

// ---------------------------------------------------------------- products

// Products run on by themselves: a fence before each batch of them, and after registers they use
// were touched; wait until at most kPending batches are running. `settle` after the wait keeps the
// compiler from moving anything on a result to before it.
DEVICE void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(kPending) : "memory");
}
template <int N>
DEVICE void settle(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(c[n][e]) :: "memory");
}

// Descriptors of factors, for the 128-byte swizzle: address, and distances in units of 16 bytes.
// For sums along rows: from 8 rows to the next 8. Turned: from panel to panel, and from 8 rows to
// the next.
DEVICE u64 descriptor(u32 tile, int panel_step, int rows_step) {
  return (u64)(tile >> 4) | (u64)(panel_step >> 4) << 16 | (u64)(rows_step >> 4) << 32 | 1ull << 62;
}
DEVICE u64 along_rows(u32 tile) { return descriptor(tile, 16, 1024); }
template <int kRows>
DEVICE u64 along_columns(u32 tile) { return descriptor(tile, kHalves * kRows * 128, 1024); }

// What takes such a descriptor to the k-th 16 numbers of the sum.
template <int kRows>
constexpr int row_step(int k) { return ((k >> 2) * kHalves * kRows * 128 + (k & 3) * 32) >> 4; }
constexpr int column_step(int k) { return k * 16 * 128 >> 4; }

// c (+)= A B^T over steps [kFrom, kTo): 64 rows of a tile of kRowsA by N * 8 of a tile of kRowsB
// rows.
template <int kFrom, int kTo, int kRowsA, int kRowsB, int N>
DEVICE void multiply_along_rows(float (&c)[N][4], u64 a, u64 b, int more) {
  static_assert(N * 8 <= kRowsB, "");
#pragma unroll
  for (int k = kFrom; k < kTo; k++)
    wgmma<false, false>(c, a + row_step<kRowsA>(k), b + row_step<kRowsB>(k), k == kFrom ? more : 1);
}

// c (+)= P B for P of 64 rows in registers, B a tile along columns: 16 rows of it a step.
template <int K, int N>
DEVICE void multiply_registers(float (&c)[N][4], const u32 (&p)[K][4], u64 b, int more) {
#pragma unroll
  for (int k = 0; k < K; k++) wgmma<true>(c, p[k], b + column_step(k), k == 0 ? more : 1);
}

// A result as the left factor of the next product.
template <int K, int N>
DEVICE void to_factor(u32 (&p)[K][4], const float (&c)[N][4]) {
  static_assert(N == 2 * K, "");
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int x = 0; x < 4; x++)
      p[k][x] = pack(Tile(), c[2 * k + (x >> 1)][2 * (x & 1)],
                     c[2 * k + (x >> 1)][2 * (x & 1) + 1]);
}

// ---------------------------------------------------------------- results

// A thread's columns of a row as bits, two of each eight: those before column `end` (less 2 t).
template <int N>
DEVICE u32 first_bits(int end) {
  static_assert(2 * N <= 32, "");
  const int count = (end >> 3) * 2 + min_of(end & 7, 2);
  return count >= 32 ? ~0u : (1u << max_of(count, 0)) - 1;
}
template <int N>
DEVICE u32 bits_within(Limits seen) {
  const int t = threadIdx.x & 3;
  return first_bits<N>(seen.end - 2 * t) & ~first_bits<N>(seen.begin - 2 * t);
}
// Scores whose bit is not among those of their row, g or g + 8, become -inf.
template <int N, class BitsOf>
DEVICE void exclude_others(float (&s)[N][4], BitsOf bits_of) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u32 bits = bits_of(half);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (!(bits >> (2 * n + e) & 1)) s[n][2 * half + e] = -infinity(float());
  }
}
template <int N, class LimitsOf>
DEVICE void exclude_outside(float (&s)[N][4], LimitsOf limits) {
  exclude_others(s, [&](int half) { return bits_within<N>(limits(half)); });
}

// Zeros times what is not finite are NaN, and what they are added to.
template <int N>
DEVICE bool all_finite(const float (&c)[N][4]) {
  float zero[4] = {};
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) zero[e] = fma_of(c[n][e], 0, zero[e]);
  return (zero[0] + zero[1]) + (zero[2] + zero[3]) == 0;
}
